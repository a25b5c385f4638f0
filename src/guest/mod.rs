//! Where pages come from: the traits that the pipeline drives, and one folder for each kind of guest.
//!
//! A source guest splits into three parts, each owned by one thread: [`GuestControl`] (control), [`DirtyLog`]
//! (scanner) and [`PageSource`] (mapper, one for each lane). One that pagecast itself hands over to a pagecast at the
//! other end is a [`MovableGuest`] besides.

pub mod arena;
pub mod process;
pub mod xen;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::stream::records::DomainHeader;
use crate::sys::TrackingError;
use crate::sys::guest_memory::GuestMemory;
use xen::XenError;

/// What can go wrong with a guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Its dirty log does not work.
    #[error(transparent)]
    Tracking(#[from] TrackingError),
    /// Xen, or what it said about the domain.
    #[error(transparent)]
    Xen(#[from] XenError),
    /// It does not answer.
    #[error("the guest at {socket} does not answer: {source}")]
    Unreachable {
        /// Its control socket.
        socket: String,
        /// What the call said.
        source: std::io::Error,
    },
    /// It answered that it cannot.
    #[error("the guest refused: {0}")]
    Refused(String),
    /// This kind of guest has no such thing as a throttle.
    #[error("this guest cannot be slowed down; use --on-no-convergence stop or abort")]
    NoThrottle,
    /// It answered something else than it was asked.
    #[error("the guest's answer makes no sense ({0}); is it the same version of pagecast?")]
    Protocol(String),
}

/// How a hand-over ended, as the source guest's host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandOver {
    /// The destination said that it runs the guest. The source never will again.
    Running,
    /// The destination holds an equal image and said that it cannot run it. The source runs on.
    Mirrored(String),
    /// The destination said that it never will, or was never told to: the source runs the guest on.
    ResumedAtSource(String),
}

/// Power over a source guest: what the control thread needs.
pub trait GuestControl {
    /// Pages of guest memory, `0..nr_pages`.
    fn nr_pages(&self) -> u64;
    /// The pages that there are now; by default all of `0..nr_pages`.
    fn populated(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::full(self.nr_pages()))
    }
    /// Starts or ends dirty logging. Before the first get-and-clear, what the log says means nothing.
    fn set_log_dirty(&mut self, on: bool) -> Result<(), GuestError>;
    /// Stops the guest; returns once its last instruction is done.
    fn suspend(&mut self) -> Result<(), GuestError>;
    /// Has the guest stand still for `percent` of its time (95 at most) until told otherwise; 0 takes the throttle off. Resuming
    /// the guest takes it off too, and so does the end of this control. A guest that can be slowed down accepts 0 at any
    /// time, which then changes nothing: that is how to find out.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        let _ = percent;
        Err(GuestError::NoThrottle)
    }
    /// Ends dirty logging and lets the guest run on at full speed.
    fn resume(&mut self) -> Result<(), GuestError>;
    /// Writes to memory that the guest has made and the time it has run, where the guest can tell.
    fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError>;
    /// The guest's dirty log. There is one: a second call is an error.
    fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError>;
    /// The guest's pages; each mapper has its own.
    fn page_source(&mut self) -> Box<dyn PageSource>;
}

/// A guest that moves to another pagecast, or is compared there.
pub trait MovableGuest: GuestControl {
    /// Whether it could run at the destination; if not, it is memory without a machine, to be compared there and forgotten.
    fn can_move(&self) -> bool {
        true
    }
    /// Errs if somebody else is migrating the guest; from here on nobody else can, until it is resumed or this control ends.
    fn claim(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
    /// Gives the suspended guest away over `connection`, on which the destination is ready.
    fn hand_over(
        &mut self,
        connection: OwnedFd,
        migration: &str,
        destination: &str,
    ) -> Result<HandOver, GuestError>;
    /// The body of the HVM_CONTEXT record of the suspended guest. `digests`: with a digest of every page, by which
    /// the destination can verify what it received, as far as they fit into a record (64 GiB of guest).
    fn context(&mut self, domain: &DomainHeader, digests: bool) -> Vec<u8>;
}

/// The dirty log of a guest: what the scanner reads.
pub trait DirtyLog: Send {
    /// Adds to `dirty` the pages written since the last call, and clears the log.
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError>;
    /// The same once more, of the suspended guest: whatever may differ from what was read before is in `dirty` afterwards.
    fn get_and_clear_last(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.get_and_clear(dirty)
    }
    /// For how long the last get-and-clear held the guest up; None: for as long as it took.
    fn held_up(&self) -> Option<Duration> {
        None
    }
    /// Adds to `dirty` the pages of `range` written since the last get-and-clear, and leaves the log as it is.
    fn peek(&mut self, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError>;
}

/// What a page held when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// Something.
    Data,
    /// Zeroes only.
    Zero,
    /// Nothing: there is no page here now.
    Absent,
}

/// The pages of a guest: what a mapper reads.
pub trait PageSource: Send {
    /// Tells which pages will be copied next, in this order: a source that has to ask for each page may ask for all of them
    /// at once. Their dirty bits were cleared before.
    fn gather(&mut self, _pfns: &[Pfn]) {}
    /// Copies a page and says whether it was all zero (in which case `into` may be left as it was).
    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent;
    /// Says whether a page is all zero, without copying it.
    fn inspect(&mut self, pfn: Pfn) -> PageContent;
    /// Tells that a page will be read soon.
    fn prefetch(&self, pfn: Pfn);
    /// The memory itself, if the kernel can send from it: pages `0..nr_pages` in one piece.
    fn sendable(&self) -> Option<std::sync::Arc<GuestMemory>>;
}
