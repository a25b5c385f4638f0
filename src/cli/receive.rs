//! `pagecast receive`: waits for one guest and runs it.

use std::path::PathBuf;

use clap::Args;

use super::{Exit, Failure, die_with_parent, units};
use crate::destination::receiver::{Receiver, Reception};
use crate::sys::console;
use crate::sys::memory_info;

/// The most guest memory to accept where the kernel does not say how much there is: 4 GiB.
const DEFAULT_MAX_MEMORY: u64 = 4 << 30;

#[derive(Args)]
pub struct ReceiveArguments {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:7100", value_name = "HOST:PORT")]
    listen: String,
    /// The control socket of the guest that will run here
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The most guest memory to accept [default: what this machine has to spare]
    #[arg(long, value_parser = units::size)]
    max_memory: Option<u64>,
    /// Write the stream, as it was received, to a file
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
    /// End, and end the guest, when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
    /// What the source knows, or is told, is not said here too: it is the process that started this one
    #[arg(long, hide = true)]
    source_is_parent: bool,
}

pub fn run(arguments: &ReceiveArguments) -> Result<Exit, Failure> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    let receiver = Receiver::listen(Reception {
        listen: arguments.listen.clone(),
        max_memory: arguments.max_memory.or_else(memory_info::available_bytes).unwrap_or(DEFAULT_MAX_MEMORY),
        guest_socket: arguments.socket.clone(),
        capture: arguments.capture.clone(),
        die_with_parent: arguments.die_with_parent,
    })
    .map_err(Failure::failed)?;
    console::say(format_args!("listening on {}", receiver.address().map_err(Failure::failed)?));
    let (received, guest) = match receiver.receive() {
        Err(error) if arguments.source_is_parent && error.is_known_to_source() => return Ok(Exit::Failed),
        other => other.map_err(Failure::failed)?,
    };
    match guest {
        Some(guest) => {
            console::say(format_args!(
                "guest running, control socket {}: {} page records received, {} pages verified",
                arguments.socket.display(),
                received.entries,
                received.verified
            ));
            guest.wait().map_err(|error| Failure::failed(format!("the guest's process: {error}")))?;
            Ok(Exit::Done)
        }
        None if received.image => {
            console::say(format_args!(
                "image of a process received: {} page records, {} pages verified; it cannot run here and is dropped",
                received.entries, received.verified
            ));
            Ok(Exit::Done)
        }
        None if arguments.source_is_parent => Ok(Exit::Failed),
        None => Err(Failure::failed("everything was received, but the source kept its guest")),
    }
}
