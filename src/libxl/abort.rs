//! The wish to end a migration, from wherever it comes: seen by whoever looks, and by whoever sleeps in poll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::sys::signals::SignalWatch;

/// SIGTERM is what libxl sends. SIGINT comes from the terminal, which sends it to xl and its save helper both, and SIGHUP
/// when the terminal goes.
const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Instead of a signal's number: none yet, and libxl has gone.
const NOBODY: i32 = 0;
const LIBXL_GONE: i32 = -1;

/// Says once and for all that the migration is to end. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Abort(Arc<State>);

#[derive(Debug)]
struct State {
    raised: AtomicBool,
    by: AtomicI32,
    /// Readable, and left so, from the moment it is raised.
    event: OwnedFd,
}

impl Abort {
    /// One that is not raised.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Abort(Arc::new(State { raised: AtomicBool::new(false), by: AtomicI32::new(NOBODY), event })))
    }

    /// Raises it at the first SIGTERM, SIGINT or SIGHUP, until the watch is ended.
    pub fn on_signals(&self) -> io::Result<SignalWatch> {
        let abort = self.clone();
        SignalWatch::start(&SIGNALS, move |signal| abort.raise(signal))
    }

    /// Raises it because libxl does not answer any more.
    pub(super) fn raise_for_loss_of_libxl(&self) {
        self.raise(LIBXL_GONE);
    }

    /// Raises it as SIGTERM would.
    #[cfg(test)]
    pub(super) fn raise_for_test(&self) {
        self.raise(libc::SIGTERM);
    }

    fn raise(&self, by: i32) {
        if self.0.by.compare_exchange(NOBODY, by, Ordering::Release, Ordering::Relaxed).is_ok() {
            self.0.raised.store(true, Ordering::Release);
            // The first write to an eventfd never waits.
            let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
        }
    }

    /// Whether the migration is to end.
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }

    /// The flag by itself, as the pipeline wants it.
    pub fn flag(&self) -> &AtomicBool {
        &self.0.raised
    }

    /// Why the migration is to end, for a message.
    pub fn reason(&self) -> String {
        match self.0.by.load(Ordering::Acquire) {
            NOBODY => "nobody asked for an end".to_owned(),
            LIBXL_GONE => "libxl has gone".to_owned(),
            libc::SIGTERM => "interrupted by SIGTERM".to_owned(),
            libc::SIGINT => "interrupted by SIGINT".to_owned(),
            libc::SIGHUP => "interrupted by SIGHUP".to_owned(),
            other => format!("interrupted by signal {other}"),
        }
    }
}

impl AsFd for Abort {
    /// What polls as readable once it is raised. Not to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    #[test]
    fn raising_it_is_seen_by_every_clone_and_by_poll_and_the_first_reason_stays() {
        let abort = Abort::new().unwrap();
        let seen = abort.clone();
        let polls = || {
            let mut event = [PollFd::new(&seen, PollFlags::IN)];
            poll(&mut event, Some(&Timespec::default())).unwrap() == 1
        };
        assert!(!seen.is_raised() && !polls());
        abort.raise(libc::SIGTERM);
        abort.raise_for_loss_of_libxl();
        assert!(seen.is_raised() && seen.flag().load(Ordering::Relaxed) && polls());
        assert_eq!(seen.reason(), "interrupted by SIGTERM");
    }
}
