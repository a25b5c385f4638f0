//! An arena guest as the migrator sees it: over its control socket, its memory and its page map.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::protocol::{Answer, Request};
use super::{CheckReport, Stats};
use crate::guest::{DirtyLog, GuestControl, GuestError, HandOver, MovableGuest, PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn, is_zero};
use crate::page_set::PageSet;
use crate::stream::arena_context::{ArenaContext, MAX_DIGESTS, page_digest};
use crate::stream::records::DomainHeader;
use crate::sys::descriptors;
use crate::sys::guest_memory::GuestMemory;
use crate::sys::pagemap::{Pagemap, Scan};

/// A connection to an arena guest.
pub struct ArenaGuest {
    socket: OwnedFd,
    path: String,
    memory: Arc<GuestMemory>,
    mapped_ahead: bool,
    pagemap: Option<OwnedFd>,
    base: u64,
    workload: String,
    seed: u64,
}

impl ArenaGuest {
    /// Connects to the guest whose control socket is at `path`.
    pub fn connect(path: &Path) -> Result<Self, GuestError> {
        let name = path.display().to_string();
        let unreachable = |source| GuestError::Unreachable { socket: name.clone(), source };
        let socket = open(path).map_err(unreachable)?;
        let (answer, mut received) = exchange(&socket, &name, &Request::Hello, &[])?;
        let Answer::Hello { nr_pages, base, workload, seed } = answer else {
            return Err(unexpected(answer));
        };
        let (Some(pagemap), Some(memory)) = (received.pop(), received.pop()) else {
            return Err(GuestError::Protocol("a greeting without memory".to_owned()));
        };
        let memory = GuestMemory::map(memory).map_err(unreachable)?;
        let fits = base.is_multiple_of(PAGE_SIZE as u64) && base.checked_add(memory.len() as u64).is_some();
        if memory.nr_pages() != nr_pages || !fits {
            return Err(GuestError::Protocol(format!(
                "{nr_pages} pages at {base:#x}, but a memory of {}",
                memory.nr_pages()
            )));
        }
        let memory = Arc::new(memory);
        Ok(ArenaGuest {
            socket,
            path: name,
            memory,
            mapped_ahead: false,
            pagemap: Some(pagemap),
            base,
            workload,
            seed,
        })
    }

    /// Connects as soon as the guest listens, for `patience` at most.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, GuestError> {
        let since = Instant::now();
        loop {
            match Self::connect(path) {
                Err(GuestError::Unreachable { .. }) if since.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }

    fn request(&self, request: &Request, sent: &[BorrowedFd<'_>]) -> Result<Answer, GuestError> {
        Ok(exchange(&self.socket, &self.path, request, sent)?.0)
    }

    fn expect_done(&self, request: &Request) -> Result<(), GuestError> {
        match self.request(request, &[])? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// The name of the guest's workload.
    pub fn workload(&self) -> &str {
        &self.workload
    }

    /// The seed of the guest's workload.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The guest's counters, and whether it is running.
    pub fn stats(&self) -> Result<(Stats, bool), GuestError> {
        match self.request(&Request::Stats, &[])? {
            Answer::Stats { stats, running, .. } => Ok((stats, running)),
            other => Err(unexpected(other)),
        }
    }

    /// Share of its time that the guest is made to stand still, in percent.
    pub fn throttle_percent(&self) -> Result<u8, GuestError> {
        match self.request(&Request::Stats, &[])? {
            Answer::Stats { throttle_percent, .. } => Ok(throttle_percent),
            other => Err(unexpected(other)),
        }
    }

    /// Has the running guest check every page of its memory.
    pub fn check(&self) -> Result<CheckReport, GuestError> {
        match self.request(&Request::Check, &[])? {
            Answer::Check { report } => Ok(report),
            other => Err(unexpected(other)),
        }
    }

    /// Has a guest whose hand-over is in doubt run here again.
    pub fn take_back(&self) -> Result<(), GuestError> {
        self.expect_done(&Request::TakeBack)
    }

    /// Ends the guest.
    pub fn quit(&self) -> Result<(), GuestError> {
        self.expect_done(&Request::Quit)
    }
}

fn open(path: &Path) -> std::io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn exchange(
    socket: &OwnedFd,
    path: &str,
    request: &Request,
    sent: &[BorrowedFd<'_>],
) -> Result<(Answer, Vec<OwnedFd>), GuestError> {
    let unreachable = |source| GuestError::Unreachable { socket: path.to_owned(), source };
    let message = serde_json::to_vec(request).expect("a request is plain data");
    descriptors::send(socket, &message, sent).map_err(unreachable)?;
    let closed = || unreachable(std::io::Error::other("it closed the connection"));
    let (message, received) = descriptors::receive(socket).map_err(unreachable)?.ok_or_else(closed)?;
    match serde_json::from_slice(&message) {
        Ok(Answer::Refused { reason }) => Err(GuestError::Refused(reason)),
        Ok(answer) => Ok((answer, received)),
        Err(error) => Err(GuestError::Protocol(error.to_string())),
    }
}

fn unexpected(answer: Answer) -> GuestError {
    GuestError::Protocol(format!("{answer:?}"))
}

impl GuestControl for ArenaGuest {
    fn nr_pages(&self) -> u64 {
        self.memory.nr_pages()
    }

    fn set_log_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        self.expect_done(&Request::LogDirty { on })
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        self.expect_done(&Request::Suspend)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.expect_done(&Request::Throttle { percent })
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.expect_done(&Request::Resume)
    }

    fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError> {
        let (stats, _) = self.stats()?;
        Ok(Some((stats.writes, stats.guest_time)))
    }

    fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let taken = || GuestError::Refused("its dirty log is in use already".to_owned());
        let pagemap = Pagemap::new(self.pagemap.take().ok_or_else(taken)?);
        Ok(Box::new(ArenaDirtyLog { pagemap, base: self.base, nr_pages: self.memory.nr_pages() }))
    }

    fn page_source(&mut self) -> Box<dyn PageSource> {
        if !std::mem::replace(&mut self.mapped_ahead, true) {
            // Else the mapper takes a fault for every 16 pages. It can do that: a refusal costs time and nothing else.
            let _ = self.memory.map_ahead();
        }
        Box::new(ArenaPages::new(self.memory.clone()))
    }
}

impl MovableGuest for ArenaGuest {
    fn claim(&mut self) -> Result<(), GuestError> {
        self.expect_done(&Request::Claim)
    }

    fn hand_over(
        &mut self,
        connection: OwnedFd,
        migration: &str,
        destination: &str,
    ) -> Result<HandOver, GuestError> {
        let request =
            Request::HandOver { migration: migration.to_owned(), destination: destination.to_owned() };
        match self.request(&request, &[connection.as_fd()])? {
            Answer::HandedOver => Ok(HandOver::Running),
            Answer::TakenBack { reason } => Ok(HandOver::ResumedAtSource(reason)),
            other => Err(unexpected(other)),
        }
    }

    fn context(&mut self, domain: &DomainHeader, digests: bool) -> Vec<u8> {
        let nr_pages = self.memory.nr_pages();
        let context = if digests && nr_pages <= MAX_DIGESTS as u64 {
            let digest = |pfn| self.memory.with_page(pfn, |page| page_digest(pfn, page));
            ArenaContext::with_digests(nr_pages, digest)
        } else {
            ArenaContext { nr_pages, digests: None }
        };
        context.encode(domain)
    }
}

/// The dirty log of an arena guest: PAGEMAP_SCAN over the guest's own mapping.
pub struct ArenaDirtyLog {
    pagemap: Pagemap,
    base: u64,
    nr_pages: u64,
}

impl ArenaDirtyLog {
    fn scan(&mut self, scan: Scan, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError> {
        let page = PAGE_SIZE as u64;
        let (base, end) = (self.base, range.end.min(self.nr_pages));
        let (first_address, end_address) = (base + range.start * page, base + end * page);
        self.pagemap.scan(scan, first_address, end_address, &mut |from, to| {
            let first = (from.max(first_address) - base) / page;
            let last = (to.min(end_address) - base) / page;
            dirty.insert_run(Pfn(first), last.saturating_sub(first));
        })?;
        Ok(())
    }
}

impl DirtyLog for ArenaDirtyLog {
    fn get_and_clear(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.scan(Scan::GetAndClear, 0..self.nr_pages, dirty)
    }

    fn peek(&mut self, range: Range<u64>, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.scan(Scan::Peek, range, dirty)
    }
}

/// The pages of an arena guest, read through the migrator's own mapping.
pub struct ArenaPages {
    memory: Arc<GuestMemory>,
}

impl ArenaPages {
    /// The pages of this mapping.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        ArenaPages { memory }
    }
}

impl PageSource for ArenaPages {
    fn copy(&mut self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) -> PageContent {
        self.memory.copy_page(pfn, into);
        // Decided on the copy: what is sent as zero must be what was read, whatever the guest does meanwhile.
        if is_zero(into) { PageContent::Zero } else { PageContent::Data }
    }

    fn inspect(&mut self, pfn: Pfn) -> PageContent {
        if self.memory.page_is_zero(pfn) { PageContent::Zero } else { PageContent::Data }
    }

    fn prefetch(&self, pfn: Pfn) {
        self.memory.prefetch(pfn);
    }

    fn sendable(&self) -> Option<Arc<GuestMemory>> {
        Some(self.memory.clone())
    }
}
