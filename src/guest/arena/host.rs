//! The process around an arena guest: its control socket, its dirty log, and the two ends of a hand-over.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    shutdown, socket_with,
};

use super::handover;
use super::protocol::{Answer, Request};
use super::vcpu::{MOST_THROTTLE_PERCENT, Start, Stopped, Vcpu};
use super::{MachineError, Spec, Stats};
use crate::guest::HandOver;
use crate::page::PAGE_SIZE;
use crate::sys::TrackingError;
use crate::sys::console;
use crate::sys::descriptors;
use crate::sys::guest_memory::GuestMemory;
use crate::sys::pagemap::{Pagemap, Scan};
use crate::sys::userfaultfd::Userfaultfd;

/// Why a guest could not be started or served.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Its memory is not to be had.
    #[error("cannot get {mib} MiB of memory for the guest: {source}; ask for less with --memory")]
    Memory {
        /// How much was asked for.
        mib: u64,
        /// What the call said.
        source: std::io::Error,
    },
    /// The memory cannot hold such a guest, or holds none.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The control socket cannot be made.
    #[error("cannot listen on {path}: {source}; choose another path with --socket")]
    Socket {
        /// Its path.
        path: String,
        /// What the call said.
        source: std::io::Error,
    },
    /// The guest's thread is gone.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A control socket that is bound and does not listen yet: so far a client is refused. Its file goes when it is dropped.
pub struct ControlSocket {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file.
    file: Option<(u64, u64)>,
}

impl ControlSocket {
    /// Binds `path`; a socket there that nobody has any more is replaced, and nothing else is.
    ///
    /// # Errors
    ///
    /// [`HostError::Socket`]: something else is there, or it cannot be made.
    pub fn bind(path: &Path) -> Result<Self, HostError> {
        let unusable = |source| HostError::Socket { path: path.display().to_string(), source };
        let failed = |error: Errno| unusable(error.into());
        let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = new().map_err(failed)?;
        match bind(&socket, &address) {
            // A connection to any other kind of file is refused just as one to a socket without a listener.
            Err(Errno::ADDRINUSE) if !is_socket(path).map_err(unusable)? => {
                return Err(unusable(io::Error::new(
                    ErrorKind::AlreadyExists,
                    "it exists and is not a socket",
                )));
            }
            // One that waits for a guest to come does not listen yet.
            Err(Errno::ADDRINUSE) if is_held(path) => return Err(failed(Errno::ADDRINUSE)),
            Err(Errno::ADDRINUSE) if connect(new().map_err(failed)?, &address) == Err(Errno::CONNREFUSED) => {
                std::fs::remove_file(path).map_err(unusable)?;
                bind(&socket, &address).map_err(failed)?;
            }
            other => other.map_err(failed)?,
        }
        Ok(ControlSocket { socket, path: path.to_owned(), file: identity(path) })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // It may have been moved away, and be another's by now.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Whether some process has a socket that was bound to `path`, by this name or by its absolute one.
fn is_held(path: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    sockets.lines().skip(1).filter_map(bound_name).any(|name| [path, &absolute].contains(&Path::new(name)))
}

/// The name in a line of /proc/net/unix: Num RefCount Protocol Flags Type St Inode Path, of which the inode is padded and the
/// path may have spaces.
fn bound_name(line: &str) -> Option<&str> {
    (0..7).try_fold(line, |rest, _| rest.trim_start().split_once(' ').map(|(_, rest)| rest))
}

/// Whether `path` itself, and not what it may be a link to, is a socket.
fn is_socket(path: &Path) -> io::Result<bool> {
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

/// Who may tell the guest what to do. A connection that claims it, starts the dirty log, slows the guest down or suspends it
/// takes it; others may only look on until that connection has put everything back, or has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tenure {
    /// Nobody; the guest runs.
    Free,
    /// The connection of this number.
    Leased(u64),
    /// The guest is being given away and nobody may touch it, its lessee included, until that is settled.
    HandingOver,
    /// The guest runs elsewhere.
    Gone,
}

/// An arena guest and its control socket.
pub struct Host {
    memory: Arc<GuestMemory>,
    vcpu: Vcpu,
    log: Mutex<Option<Userfaultfd>>,
    tenure: Mutex<Tenure>,
    take_back: AtomicBool,
    control: ControlSocket,
    connections: AtomicU64,
    quit: AtomicBool,
}

impl Host {
    /// Boots a new guest of `nr_pages` pages.
    pub fn boot(nr_pages: u64, spec: Spec, control: ControlSocket) -> Result<Arc<Self>, HostError> {
        let mib = (nr_pages * PAGE_SIZE as u64) >> 20;
        let memory = GuestMemory::create(nr_pages).map_err(|source| HostError::Memory { mib, source })?;
        Self::start(Arc::new(memory), Start::Boot(spec), control)
    }

    /// Adopts the guest that `memory` holds, suspended.
    pub fn adopt(memory: Arc<GuestMemory>, control: ControlSocket) -> Result<Arc<Self>, HostError> {
        Self::start(memory, Start::Adopt, control)
    }

    fn start(memory: Arc<GuestMemory>, start: Start, control: ControlSocket) -> Result<Arc<Self>, HostError> {
        let vcpu = Vcpu::start(memory.clone(), start)?;
        Ok(Arc::new(Host {
            memory,
            vcpu,
            log: Mutex::new(None),
            tenure: Mutex::new(Tenure::Free),
            take_back: AtomicBool::new(false),
            control,
            connections: AtomicU64::new(1),
            quit: AtomicBool::new(false),
        }))
    }

    /// Lets the guest run.
    pub fn resume(&self) -> Result<(), Stopped> {
        self.vcpu.resume()
    }

    /// From now on clients of the control socket are let in; they are answered by [`Host::serve`].
    ///
    /// # Errors
    ///
    /// [`HostError::Socket`]: the kernel refuses.
    pub fn listen(&self) -> Result<(), HostError> {
        let path = || self.control.path.display().to_string();
        listen(&self.control.socket, 16)
            .map_err(|error| HostError::Socket { path: path(), source: error.into() })
    }

    /// Serves the control socket until the guest is told to quit or has moved away and nobody minds it any more.
    pub fn serve(self: &Arc<Self>) {
        while !self.quit.load(Ordering::Acquire) {
            let Ok(socket) = accept_with(&self.control.socket, SocketFlags::CLOEXEC) else {
                // Out of descriptors, or told to quit.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            let host = self.clone();
            let number = self.connections.fetch_add(1, Ordering::Relaxed);
            let served = std::thread::Builder::new()
                .name("guest-control".to_owned())
                .spawn(move || Connection { host: &host, socket, number }.serve());
            if let Err(error) = served {
                console::complain(format_args!("pagecast guest: cannot serve a connection: {error}"));
            }
        }
    }

    /// Ends [`Host::serve`].
    pub fn end(&self) {
        self.quit.store(true, Ordering::Release);
        // Wakes the accept in `serve`.
        let _ = shutdown(&self.control.socket, Shutdown::Both);
    }

    fn set_log_dirty(&self, on: bool) -> Result<(), String> {
        let mut log = self.log.lock().expect("nobody panics with the log in hand");
        let (base, len) = (self.memory.base(), self.memory.len());
        match (on, log.take()) {
            (true, None) => {
                let uffd = Userfaultfd::open().map_err(|error| error.to_string())?;
                uffd.register(base, len).map_err(|error| error.to_string())?;
                *log = Some(uffd);
                Ok(())
            }
            (true, Some(uffd)) => {
                *log = Some(uffd);
                Err("somebody else is logging this guest's writes; wait until that ends".to_owned())
            }
            (false, Some(uffd)) => uffd.unregister(base, len).map_err(|error| error.to_string()),
            (false, None) => Ok(()),
        }
    }
}

/// Whether this kernel and these rights allow dirty tracking: tries all of it on a page of its own.
pub fn try_tracking() -> Result<(), TrackingError> {
    let memory = GuestMemory::create(1).map_err(|error| TrackingError::Io("get a page of memory", error))?;
    let uffd = Userfaultfd::open()?;
    uffd.register(memory.base(), memory.len())?;
    let own = Pagemap::of_self().map_err(|error| TrackingError::Io("open /proc/self/pagemap", error))?;
    let (start, end) = (memory.base() as u64, memory.base() as u64 + memory.len() as u64);
    Pagemap::new(own).scan(Scan::GetAndClear, start, end, &mut |_, _| {})
}

struct Connection<'a> {
    host: &'a Host,
    socket: OwnedFd,
    number: u64,
}

impl Connection<'_> {
    fn serve(self) {
        while let Ok(Some((message, descriptors))) = descriptors::receive(&self.socket) {
            let answer = match serde_json::from_slice::<Request>(&message) {
                Ok(Request::Hello) => {
                    self.hello();
                    continue;
                }
                Ok(Request::Quit) => match self.may_quit() {
                    Ok(()) => {
                        self.answer(&Answer::Done, &[]);
                        return self.host.end();
                    }
                    Err(reason) => Answer::Refused { reason },
                },
                Ok(request) => {
                    self.perform(request, descriptors).unwrap_or_else(|reason| Answer::Refused { reason })
                }
                Err(error) => {
                    let reason = format!("no such request ({error}); is it the same version of pagecast?");
                    Answer::Refused { reason }
                }
            };
            self.answer(&answer, &[]);
        }
        self.end_lease();
    }

    fn answer(&self, answer: &Answer, descriptors: &[BorrowedFd<'_>]) {
        let message = serde_json::to_vec(answer).expect("an answer is plain data");
        // A client that has gone shows at the next receive.
        let _ = descriptors::send(&self.socket, &message, descriptors);
    }

    fn hello(&self) {
        let memory = &self.host.memory;
        let spec = self.host.vcpu.spec();
        match Pagemap::of_self() {
            Ok(pagemap) => self.answer(
                &Answer::Hello {
                    nr_pages: memory.nr_pages(),
                    base: memory.base() as u64,
                    workload: spec.workload.to_string(),
                    seed: spec.seed,
                },
                &[memory.fd(), pagemap.as_fd()],
            ),
            Err(error) => {
                let reason = format!("the guest cannot open its own page map: {error}");
                self.answer(&Answer::Refused { reason }, &[]);
            }
        }
    }

    fn tenure(&self) -> MutexGuard<'_, Tenure> {
        self.host.tenure.lock().expect("nobody panics with the tenure in hand")
    }

    /// Takes the lease, or has it already.
    fn lease(&self) -> Result<MutexGuard<'_, Tenure>, String> {
        let mut tenure = self.tenure();
        match *tenure {
            Tenure::Free => *tenure = Tenure::Leased(self.number),
            Tenure::Leased(number) if number == self.number => {}
            other => return Err(refusal(other)),
        }
        Ok(tenure)
    }

    fn may_quit(&self) -> Result<(), String> {
        let tenure = self.tenure();
        match *tenure {
            Tenure::Free | Tenure::Gone => Ok(()),
            Tenure::Leased(number) if number == self.number => Ok(()),
            other => Err(refusal(other)),
        }
    }

    fn perform(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, String> {
        let stopped = |error: Stopped| error.to_string();
        match request {
            Request::Claim => drop(self.lease()?),
            Request::LogDirty { on } => {
                let _tenure = self.lease()?;
                self.host.set_log_dirty(on)?;
            }
            Request::Suspend => {
                let _tenure = self.lease()?;
                self.host.vcpu.suspend().map_err(stopped)?;
            }
            // To take off what one has not put on changes nothing, and needs no lease.
            Request::Throttle { percent: 0 } if *self.tenure() == Tenure::Free => {}
            Request::Throttle { percent } => {
                if percent > MOST_THROTTLE_PERCENT {
                    return Err(format!(
                        "{percent} % is too much; slow it down by {MOST_THROTTLE_PERCENT} % at most"
                    ));
                }
                let _tenure = self.lease()?;
                self.host.vcpu.throttle(percent).map_err(stopped)?;
            }
            Request::Resume => {
                let mut tenure = self.lease()?;
                self.host.set_log_dirty(false)?;
                self.host.vcpu.throttle(0).map_err(stopped)?;
                self.host.vcpu.resume().map_err(stopped)?;
                *tenure = Tenure::Free;
            }
            Request::Stats => {
                let (stats, running, throttle_percent) = self.host.vcpu.stats().map_err(stopped)?;
                return Ok(Answer::Stats { stats, running, throttle_percent });
            }
            Request::Check => {
                let report = self.host.vcpu.check().map_err(stopped)?;
                let report = report.ok_or("the guest is suspended; resume it first")?;
                return Ok(Answer::Check { report });
            }
            Request::HandOver { migration, destination } => {
                return self.hand_over(descriptors, &migration, &destination);
            }
            Request::TakeBack => {
                if *self.tenure() != Tenure::HandingOver {
                    return Err("no hand-over is in doubt; there is nothing to take back".to_owned());
                }
                self.host.take_back.store(true, Ordering::Release);
            }
            Request::Hello | Request::Quit => unreachable!("served before"),
        }
        Ok(Answer::Done)
    }

    fn hand_over(
        &self,
        mut descriptors: Vec<OwnedFd>,
        migration: &str,
        destination: &str,
    ) -> Result<Answer, String> {
        let connection = descriptors.pop().ok_or("a hand-over needs the connection to the destination")?;
        {
            let mut tenure = self.lease()?;
            let (_, running, _): (Stats, bool, u8) =
                self.host.vcpu.stats().map_err(|error| error.to_string())?;
            if running {
                return Err("only a suspended guest can be handed over".to_owned());
            }
            self.host.take_back.store(false, Ordering::Release);
            *tenure = Tenure::HandingOver;
        }
        // Not with the tenure in hand: this can take as long as the destination cannot be asked.
        let settled = handover::give(connection, migration, destination, &self.host.take_back);
        let mut tenure = self.tenure();
        match settled {
            HandOver::Running => {
                *tenure = Tenure::Gone;
                Ok(Answer::HandedOver)
            }
            HandOver::ResumedAtSource(reason) | HandOver::Mirrored(reason) => {
                *tenure = Tenure::Leased(self.number);
                drop(tenure);
                self.end_lease();
                Ok(Answer::TakenBack { reason })
            }
        }
    }

    /// Leaves the guest as it was before this connection asked anything of it. When the guest has moved away, nobody
    /// minds this process any more.
    fn end_lease(&self) {
        let mut tenure = self.tenure();
        match *tenure {
            Tenure::Leased(number) if number == self.number => {
                if let Err(error) = self.host.set_log_dirty(false) {
                    console::complain(format_args!("pagecast guest: {error}"));
                }
                if let Err(error) = self.host.vcpu.throttle(0).and_then(|()| self.host.vcpu.resume()) {
                    console::complain(format_args!("pagecast guest: {error}"));
                }
                *tenure = Tenure::Free;
            }
            Tenure::Gone => self.host.end(),
            Tenure::Free | Tenure::Leased(_) | Tenure::HandingOver => {}
        }
    }
}

fn refusal(tenure: Tenure) -> String {
    match tenure {
        Tenure::Free => "the guest is free",
        Tenure::Leased(_) => "another migration of this guest is under way; wait until it ends",
        Tenure::HandingOver => {
            "the guest is being handed over, and only the destination's word can settle that; if the destination is \
             gone for good, `pagecast take-back` says what can be done"
        }
        Tenure::Gone => "the guest has moved away",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_that_waits_for_its_guest_is_not_taken_and_an_abandoned_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b");
        let first = ControlSocket::bind(&path).unwrap();
        let refusal = ControlSocket::bind(&path).err().expect("somebody has it").to_string();
        assert!(refusal.contains("in use") && refusal.contains("--socket"), "{refusal}");
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "nobody has it any more");
        ControlSocket::bind(&path).unwrap();
    }

    #[test]
    fn a_socket_takes_its_own_file_with_it_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (folder.path().join("socket"), folder.path().join("elsewhere"));
        let first = ControlSocket::bind(&path).unwrap();
        std::fs::rename(&path, &elsewhere).unwrap();
        let _second = ControlSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
