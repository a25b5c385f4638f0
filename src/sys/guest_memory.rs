//! Guest RAM held in a memfd, as one process sees it.
//!
//! The same memfd is mapped by the guest (which writes it), by the migrator (which reads it for sending) and,
//! at the destination, by the receiver (which fills it). Dirty tracking belongs to a *mapping*: only stores
//! through the guest's own mapping are seen, and pinning this mapping for sending dirties nothing there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};

/// A shared, writable mapping of a memfd that cannot change its size.
pub struct GuestMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    /// There is a [`Writer`].
    written: AtomicBool,
}

// SAFETY: the mapping is owned by this value and valid until it is dropped, whichever thread uses it. Access to
// the bytes goes through raw copies or through unsafe functions whose callers promise exclusion.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; nothing in a shared GuestMemory changes after construction.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Creates and maps `nr_pages` pages of zeroes.
    pub fn create(nr_pages: u64) -> io::Result<Self> {
        let fd =
            rustix::fs::memfd_create("pagecast-guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, nr_pages * PAGE_SIZE as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd)
    }

    /// Maps a memfd received from another process. It must be sealed against shrinking: otherwise its owner
    /// could turn any access here into a SIGBUS.
    pub fn map(fd: OwnedFd) -> io::Result<Self> {
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::other("the memory is not sealed against shrinking"));
        }
        let len = rustix::fs::fstat(&fd)?.st_size as usize;
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(io::Error::other(format!("{len} bytes are not a whole number of pages")));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                std::os::fd::AsRawFd::as_raw_fd(&fd),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).expect("mmap without MAP_FIXED never returns null");
        // SAFETY: the range is the mapping just made. Guest memory belongs in no core dump.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) };
        Ok(GuestMemory { fd, base, len, written: AtomicBool::new(false) })
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping of no pages is refused.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Pages mapped.
    pub fn nr_pages(&self) -> u64 {
        (self.len / PAGE_SIZE) as u64
    }

    /// Where the mapping begins in this process.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Allocates every page and fills this process's page tables, so that later accesses do not fault.
    pub fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is exactly this mapping; populating changes no contents.
        let rc = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_POPULATE_WRITE) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Fills this process's page tables, so that reading does not fault. A guest that exists has all of its pages.
    pub fn map_ahead(&self) -> io::Result<()> {
        // SAFETY: the range is exactly this mapping; populating changes no contents.
        let rc = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, libc::MADV_POPULATE_READ) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Address of a page. Panics if the page is outside the memory.
    pub fn page(&self, pfn: Pfn) -> *const u8 {
        assert!(pfn.0 < self.nr_pages(), "page {pfn} is outside the memory");
        // SAFETY: the page lies within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(pfn.index() * PAGE_SIZE) }
    }

    /// Copies a page out. The guest may be writing it: the copy can then be torn, and the dirty log says so.
    pub fn copy_page(&self, pfn: Pfn, into: &mut [u8; PAGE_SIZE]) {
        let from = self.page(pfn);
        // SAFETY: `from` is a whole mapped page that no other mapping of ours aliases mutably, and any bytes
        // are a valid [u8]. Stores of another process may interleave; what that tears is sent again.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), PAGE_SIZE) }
    }

    /// Whether a page reads as all zero now; looks no further than the first 64 bytes that are not.
    pub fn page_is_zero(&self, pfn: Pfn) -> bool {
        let page = self.page(pfn).cast::<[u64; 8]>();
        (0..PAGE_SIZE / 64).all(|line| {
            // SAFETY: line by line within the mapped, page-aligned page; volatile because another process
            // may store to it at any time.
            let words = unsafe { page.add(line).read_volatile() };
            words.iter().fold(0, |all, word| all | word) == 0
        })
    }

    /// Asks for a page's first cache lines ahead of its use.
    pub fn prefetch(&self, pfn: Pfn) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let page = self.page(pfn).cast::<i8>();
            for line in 0..4 {
                // SAFETY: a prefetch reads nothing architecturally, and the address is within the page.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(page.add(line * 64)) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = pfn;
    }

    /// Calls `look` with a copy of a page.
    pub fn with_page<R>(&self, pfn: Pfn, look: impl FnOnce(&[u8; PAGE_SIZE]) -> R) -> R {
        let mut page = [0; PAGE_SIZE];
        self.copy_page(pfn, &mut page);
        look(&page)
    }

    /// All of the memory, to be written by one holder at a time; None while there is one.
    pub fn writer(&self) -> Option<Writer<'_>> {
        let free = self.written.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire);
        free.is_ok().then_some(Writer { memory: self })
    }
}

/// The right to write a guest's memory through one mapping: there is one at a time.
///
/// Other processes may read the same memory, and torn reads are theirs to cope with; that no other process *writes* it
/// at the same time (a guest runs in one process only) is what the protocols around it are for.
pub struct Writer<'m> {
    memory: &'m GuestMemory,
}

impl<'m> Writer<'m> {
    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: exactly the mapping, which outlives the writer; this is the only writer, and it is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base.as_ptr(), self.memory.len) }
    }

    /// Splits the right by lanes: each part reaches the pages of its own lane only.
    pub fn by_lane(&mut self, lanes: usize) -> Vec<LaneWriter<'_>> {
        (0..lanes).map(|lane| LaneWriter { memory: self.memory, lane, lanes }).collect()
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.memory.written.store(false, Ordering::Release);
    }
}

/// The right to write the pages of one lane.
pub struct LaneWriter<'m> {
    memory: &'m GuestMemory,
    lane: usize,
    lanes: usize,
}

impl LaneWriter<'_> {
    /// Whether a page is of this lane.
    pub fn has(&self, pfn: Pfn) -> bool {
        pfn.0 < self.memory.nr_pages() && pfn.lane(self.lanes) == self.lane
    }

    /// Pages of all lanes together.
    pub fn nr_pages(&self) -> u64 {
        self.memory.nr_pages()
    }

    /// Hands out runs of pages in ascending order.
    pub fn runs(&mut self) -> RunCursor<'_> {
        RunCursor { memory: self.memory, lane: self.lane, lanes: self.lanes, next: Pfn(0) }
    }
}

/// Hands out runs of a lane's pages, each once and in ascending order, so that they may all be held at a time.
pub struct RunCursor<'m> {
    memory: &'m GuestMemory,
    lane: usize,
    lanes: usize,
    next: Pfn,
}

impl<'m> RunCursor<'m> {
    /// The next run. Panics if it begins before the end of the last one, or leaves the memory or the lane.
    pub fn take(&mut self, first: Pfn, pages: usize) -> &'m mut [u8] {
        let end = first.0.checked_add(pages as u64).expect("a run of pages ends within 64 bits");
        assert!(first >= self.next && end <= self.memory.nr_pages(), "run {first}+{pages} is out of order");
        let mut of_lane =
            (first.chunk()..(end as usize).div_ceil(CHUNK_PAGES)).map(|chunk| chunk % self.lanes);
        assert!(of_lane.all(|lane| lane == self.lane), "run {first}+{pages} leaves lane {}", self.lane);
        self.next = Pfn(end);
        // SAFETY: within the mapping and, by the order, apart from every run handed out before by this cursor; other
        // lanes' cursors have other chunks, and the lanes' writers are borrowed from the only writer there is.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.memory.base.as_ptr().add(first.index() * PAGE_SIZE),
                pages * PAGE_SIZE,
            )
        }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and is unmapped once, here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_one_memfd_see_the_same_pages() {
        let ours = GuestMemory::create(4).unwrap();
        let theirs = GuestMemory::map(ours.fd().try_clone_to_owned().unwrap()).unwrap();
        ours.writer().expect("the first writer").bytes()[2 * PAGE_SIZE..3 * PAGE_SIZE].fill(7);
        let mut page = [0; PAGE_SIZE];
        theirs.copy_page(Pfn(2), &mut page);
        assert!(page.iter().all(|byte| *byte == 7));
        assert!(theirs.page_is_zero(Pfn(1)) && !theirs.page_is_zero(Pfn(2)));
    }

    #[test]
    fn there_is_one_writer_at_a_time() {
        let memory = GuestMemory::create(1).unwrap();
        let writer = memory.writer();
        assert!(writer.is_some() && memory.writer().is_none());
        drop(writer);
        assert!(memory.writer().is_some());
    }

    #[test]
    fn lanes_reach_their_own_pages_only_and_each_page_once() {
        let memory = GuestMemory::create(4 * 512).unwrap();
        let mut writer = memory.writer().unwrap();
        let mut lanes = writer.by_lane(2);
        assert!(lanes[0].has(Pfn(511)) && !lanes[0].has(Pfn(512)) && !lanes[0].has(Pfn(4 * 512)));
        let mut runs = lanes[0].runs();
        let (one, two) = (runs.take(Pfn(3), 2), runs.take(Pfn(1024), 512));
        one.fill(1);
        two.fill(2);
        let refused = |first: u64, pages: usize| {
            let mut runs = LaneWriter { memory: &memory, lane: 0, lanes: 2 };
            let take = std::panic::AssertUnwindSafe(|| {
                let mut runs = runs.runs();
                runs.take(Pfn(8), 1);
                runs.take(Pfn(first), pages).len()
            });
            std::panic::catch_unwind(take).is_err()
        };
        assert!(refused(8, 1) && refused(7, 1), "not twice");
        assert!(refused(511, 2) && refused(512, 1), "not another lane's");
        assert!(refused(4 * 512, 1) && refused(u64::MAX, 1), "not outside");
        assert!(!refused(9, 503));
    }

    #[test]
    fn memory_that_its_owner_could_shrink_is_refused() {
        let fd = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert!(GuestMemory::map(fd).is_err_and(|error| error.to_string().contains("shrinking")));
    }
}
