//! The process that will run the guest at the destination.
//!
//! The receiver starts it early, gives it the memory to map while the stream comes in, and at the end the connection
//! and the listener. From then on the receiver has no part in the hand-over any more, and may die.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};

use super::ReceiveError;
use crate::guest::arena::handover;
use crate::guest::arena::host::{ControlSocket, Host, HostError};
use crate::sys::guest_memory::GuestMemory;
use crate::sys::{console, descriptors};
use crate::transport::session::Message;

/// What the receiver tells the guest's process, and the other way round.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
enum Step {
    /// Map the memory that comes with this.
    Map,
    /// It is mapped.
    Mapped,
    /// The memory is complete; the connection and the listener come with this.
    Arm { migration: String, ready: Message },
    /// The memory holds a guest; it waits for the source's word.
    Armed,
    /// It cannot be done.
    Failed { reason: String },
    /// The guest runs.
    Running,
    /// The source kept its guest.
    GivenUp,
}

fn say(channel: &OwnedFd, step: &Step, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
    let message = serde_json::to_vec(step).expect("a step is plain data");
    descriptors::send(channel, &message, descriptors)
}

fn hear(channel: &OwnedFd) -> io::Result<(Step, Vec<OwnedFd>)> {
    let closed = || io::Error::other("it ended");
    let (message, received) = descriptors::receive(channel)?.ok_or_else(closed)?;
    let step = serde_json::from_slice(&message).map_err(|error| io::Error::other(error.to_string()))?;
    Ok((step, received))
}

/// The guest's process as the receiver has it.
pub struct Incoming {
    channel: OwnedFd,
    child: Child,
}

impl Incoming {
    /// Starts the process, which will listen on `socket`, and has it map `memory`. If `die_with_parent`, it ends
    /// when the receiver does.
    pub fn start(memory: &GuestMemory, socket: &Path, die_with_parent: bool) -> Result<Self, ReceiveError> {
        let failed = |error: io::Error| ReceiveError::Guest(error.to_string());
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None)
                .map_err(|error| failed(error.into()))?;
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let program = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        command.arg("guest").arg("--incoming").arg(theirs.as_raw_fd().to_string());
        command.arg("--socket").arg(socket).stdin(Stdio::null()).stdout(Stdio::null());
        if die_with_parent {
            command.arg("--die-with-parent");
        }
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(failed)?;
        drop(theirs);
        let incoming = Incoming { channel: ours, child };
        say(&incoming.channel, &Step::Map, &[memory.fd()]).map_err(failed)?;
        Ok(incoming)
    }

    fn expect(&self, wanted: impl FnOnce(&Step) -> bool) -> Result<Step, ReceiveError> {
        match hear(&self.channel) {
            Ok((Step::Failed { reason }, _)) => Err(ReceiveError::Guest(reason)),
            Ok((step, _)) if wanted(&step) => Ok(step),
            Ok((step, _)) => Err(ReceiveError::Guest(format!("unexpected answer {step:?}"))),
            Err(error) => Err(ReceiveError::Guest(error.to_string())),
        }
    }

    /// Waits until the memory is mapped.
    pub fn mapped(&self) -> Result<(), ReceiveError> {
        self.expect(|step| matches!(step, Step::Mapped)).map(drop)
    }

    /// Hands everything over: the process will say `ready` on `connection`. The memory must be complete. True: the
    /// guest runs here; false: the source kept it.
    pub fn arm(
        &self,
        migration: &str,
        ready: Message,
        connection: impl AsFd,
        listener: impl AsFd,
    ) -> Result<bool, ReceiveError> {
        let step = Step::Arm { migration: migration.to_owned(), ready };
        say(&self.channel, &step, &[connection.as_fd(), listener.as_fd()])
            .map_err(|error| ReceiveError::Guest(error.to_string()))?;
        self.expect(|step| matches!(step, Step::Armed))?;
        let settled = self.expect(|step| matches!(step, Step::Running | Step::GivenUp))?;
        Ok(matches!(settled, Step::Running))
    }

    /// Waits for the process to end.
    pub fn wait(mut self) -> io::Result<()> {
        self.child.wait().map(drop)
    }
}

/// The guest's process itself: `channel` is its end of the receiver's channel. Ok(true): the guest ran here and has
/// ended; Ok(false): the source kept it, or the receiver was told why it cannot come here.
pub fn run(channel: OwnedFd, socket: &Path) -> Result<bool, ReceiveError> {
    let failed = |error: io::Error| ReceiveError::Guest(error.to_string());
    let (step, mut received) = hear(&channel).map_err(failed)?;
    let (Step::Map, Some(memory)) = (step, received.pop()) else {
        return Err(ReceiveError::Guest("the receiver did not send any memory".to_owned()));
    };
    // Now, and not when the guest has come: a path that cannot be bound is no reason to stop a guest for.
    let control = match ControlSocket::bind(socket) {
        Ok(control) => control,
        Err(error) => return give_up(&channel, &error),
    };
    let memory = Arc::new(GuestMemory::map(memory).map_err(failed)?);
    memory.populate().map_err(failed)?;
    say(&channel, &Step::Mapped, &[]).map_err(failed)?;

    let Ok((Step::Arm { migration, ready }, mut received)) = hear(&channel) else {
        // The receiver has gone, or says nothing that could start a guest: there is none.
        return Ok(false);
    };
    let (Some(listener), Some(connection)) = (received.pop(), received.pop()) else {
        return Err(ReceiveError::Guest("the receiver did not send its connection".to_owned()));
    };
    let host = match Host::adopt(memory, control) {
        Ok(host) => host,
        Err(error) => return give_up(&channel, &error),
    };
    let _ = say(&channel, &Step::Armed, &[]);
    let start = || {
        host.resume().map_err(|error| error.to_string())?;
        // Before the source hears that the guest runs here: whoever hears it there may connect at once.
        if let Err(error) = host.listen() {
            // The guest is here and nowhere else: it runs on without a control socket.
            console::complain(format_args!("pagecast guest: {error}"));
        }
        Ok(())
    };
    let runs = handover::take(connection, listener, &migration, &ready, start).map_err(failed)?;
    let _ = say(&channel, if runs { &Step::Running } else { &Step::GivenUp }, &[]);
    if runs {
        host.serve();
    } else {
        std::thread::sleep(handover::LINGER);
    }
    Ok(runs)
}

/// Has the receiver say why the guest cannot come here.
fn give_up(channel: &OwnedFd, error: &HostError) -> Result<bool, ReceiveError> {
    let reason = error.to_string();
    match say(channel, &Step::Failed { reason }, &[]) {
        Ok(()) => Ok(false),
        Err(_) => Err(ReceiveError::Guest(error.to_string())),
    }
}
