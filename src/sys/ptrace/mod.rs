//! Borrowing a thread of another process for two system calls: `userfaultfd` and, once this process has a copy of the
//! descriptor, `close`. That is how the memory of a program that knows nothing of pagecast comes to be tracked.
//!
//! **The target lives on, whatever happens here.** While a thread is borrowed its registers and its signal mask are not
//! its own; a tracer that died then would set it free like that. So the borrowing is not done by this process but by a
//! child forked for it, the tracer: in a session of its own and with every signal blocked, it needs nothing from this
//! process but the order. A SIGKILL of the recorder, of its process group or of its terminal in the middle of an
//! attachment leaves the tracer to end it. Only a SIGKILL of the tracer itself, within the fraction of a millisecond that
//! it lives (or the kernel's out-of-memory killer choosing it), could do harm. After the attachment nothing of the target
//! is held but the descriptor: the end of its owner, of any kind, ends the tracking.
//!
//! Only the borrowed thread stops; the others run on. x86-64 only; elsewhere a clean error.

#[cfg(target_arch = "x86_64")]
mod tracer;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::TrackingError;
#[cfg(target_arch = "x86_64")]
use super::descriptors;

/// The bytes of the instruction `syscall`.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0F, 0x05];

/// Whom to borrow a thread from.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// The process.
    pub pid: i32,
    /// The thread, of that process.
    pub thread: i32,
    /// Where in its memory there is a `syscall` instruction.
    pub syscall_at: u64,
    /// Whether it lives under a seccomp filter, which is to be suspended meanwhile: it might kill the process for a
    /// system call that it does not know.
    pub has_seccomp: bool,
    /// How long the thread may take to stop.
    pub patience: Duration,
}

/// What a borrowed thread has brought.
#[derive(Debug)]
pub struct Opened {
    /// A userfaultfd whose memory is the target's, as it came from the kernel.
    pub descriptor: OwnedFd,
    /// How long the thread was stopped.
    pub stopped: Duration,
}

/// Why a thread could not be borrowed.
#[derive(Debug, thiserror::Error)]
pub enum BorrowError {
    /// This is not x86-64.
    #[error("attaching to a process works on x86-64 only")]
    Architecture,
    /// There is no such thread any more; another one of the process may do.
    #[error("the thread has ended")]
    Gone,
    /// It may not be traced: another's, or traced already.
    #[error(
        "process {0} may not be traced: be root (or its owner with CAP_SYS_PTRACE), and see that no debugger or strace \
         has hold of it (TracerPid in /proc/{0}/status)"
    )]
    Rights(i32),
    /// It did not stop in time; another thread may.
    #[error("the thread does not stop: it waits inside the kernel")]
    Stuck,
    /// It is a 32-bit program.
    #[error("process {0} runs 32-bit code; only 64-bit programs can be attached to")]
    ThirtyTwoBit(i32),
    /// A filter that cannot be suspended.
    #[error("process {0} lives under a seccomp filter, and suspending that takes CAP_SYS_ADMIN")]
    Seccomp(i32),
    /// It intercepts its own system calls.
    #[error("process {0} dispatches its own system calls (PR_SET_SYSCALL_USER_DISPATCH), as Wine does")]
    Dispatched(i32),
    /// It was in the middle of what must not be interrupted, again and again.
    #[error("the thread is never outside a restartable sequence (rseq)")]
    Restartable,
    /// The instruction is not where it was a moment ago; the process may have become another program.
    #[error("there is no system call instruction at the given place")]
    NoInstruction,
    /// Its own userfaultfd call failed.
    #[error("process {0} cannot open a userfaultfd: {1}")]
    Refused(i32, #[source] io::Error),
    /// Something else.
    #[error("cannot {0}: {1}")]
    Io(&'static str, #[source] io::Error),
}

impl BorrowError {
    /// Whether another thread of the same process may do better.
    pub fn is_of_thread(&self) -> bool {
        matches!(self, BorrowError::Gone | BorrowError::Stuck | BorrowError::Restartable)
    }
}

impl From<BorrowError> for TrackingError {
    fn from(error: BorrowError) -> Self {
        match error {
            BorrowError::Rights(_) | BorrowError::Seccomp(_) => TrackingError::Rights(error.to_string()),
            BorrowError::Refused(_, ref source) if source.raw_os_error() == Some(libc::ENOSYS) => {
                TrackingError::Kernel("it was built without CONFIG_USERFAULTFD".to_owned())
            }
            BorrowError::Io(what, source) => TrackingError::Io(what, source),
            other => TrackingError::Target(other.to_string()),
        }
    }
}

/// Has a thread of another process open a userfaultfd, takes a copy of it, and has the thread close its own.
#[cfg(target_arch = "x86_64")]
pub fn open_userfaultfd(order: &Order) -> Result<Opened, BorrowError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    let io = |what| move |error: rustix::io::Errno| BorrowError::Io(what, error.into());
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(io("make a pair of sockets"))?;
    let tracer = tracer::fork(order, &theirs).map_err(|error| BorrowError::Io("fork a tracer", error))?;
    drop(theirs);
    let received = descriptors::receive(&ours);
    tracer::reap(tracer);
    let failed = |error| BorrowError::Io("hear from the tracer", error);
    let (message, mut received) =
        received.map_err(failed)?.ok_or_else(|| failed(io::Error::other("it has died")))?;
    let answer = tracer::Answer::decode(&message)
        .ok_or_else(|| failed(io::Error::other("it has answered nonsense")))?;
    match (answer.outcome(order.pid), received.pop()) {
        (Err(error), _) => Err(error),
        (Ok(stopped), Some(descriptor)) => Ok(Opened { descriptor, stopped }),
        (Ok(_), None) => Err(failed(io::Error::other("it has brought no descriptor"))),
    }
}

/// Has a thread of another process open a userfaultfd; only on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub fn open_userfaultfd(_: &Order) -> Result<Opened, BorrowError> {
    Err(BorrowError::Architecture)
}
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) mod specimen;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
