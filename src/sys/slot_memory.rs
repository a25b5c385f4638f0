//! The memory that slots are cut from: one contiguous, page-aligned block, in huge pages where there are any.
//!
//! Huge pages save the mapper TLB misses. For zero-copy sends from registered buffers they are no good: TCP counts a
//! fragment of a registered 2 MiB page from that page's beginning (`io_sg_from_iter` in the kernel; measured on Linux
//! 6.18), so 64 KiB weigh 1 MiB in the mean, and at most 400 KB are on their way at a time (docs/data-path.md).
//! [`SlotMemory::small`] is for those. What always holds: every page is there before the first slot is used, so
//! nothing faults on the hot path and a shortage shows at start; [`SlotMemory::backing`] says what the kernel gave, not what
//! it was asked for; a forked child and a core dump get none of it, for it holds
//! the guest's memory. (An heir, [`super::heir`], has all that this process has.)

use std::alloc::Layout;
use std::ptr::{self, NonNull};
use std::{fmt, fs, io};

use super::heir;

/// The machine's smallest page; sizes are rounded up to it.
const SMALL_PAGE: usize = 4096;

/// The huge page that transparent huge pages come in on x86.
const HUGE_PAGE: usize = 2 << 20;

/// Far more than the slots of any link need; keeps the arithmetic below from overflowing.
const MAX_BYTES: usize = 1 << 40;

/// What a [`SlotMemory`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Pages from the hugetlb pool.
    HugeTlb,
    /// Transparent huge pages throughout.
    TransparentHuge,
    /// 4 KiB pages, at least in part.
    Small,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::HugeTlb => "hugetlb pages",
            Self::TransparentHuge => "transparent huge pages",
            Self::Small => "4 KiB pages",
        })
    }
}

/// Why there is no memory for slots.
#[derive(Debug, thiserror::Error)]
pub enum SlotMemoryError {
    /// The size is 0 or absurd.
    #[error("slot memory of {bytes} bytes: the size must be from 1 byte to 1 TiB")]
    Size {
        /// What was asked for.
        bytes: usize,
    },
    /// The kernel refused.
    #[error("cannot {step} {bytes} bytes of slot memory: {source}; ask for fewer or smaller slots")]
    Refused {
        /// What failed: "map", "prepare" or "populate".
        step: &'static str,
        /// The size of the block.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A block of memory, all zero at first, unmapped when dropped unless this process has an heir.
#[derive(Debug)]
pub struct SlotMemory {
    base: NonNull<u8>,
    len: usize,
    huge_bytes: usize,
    mapping: Mapping,
}

/// How to give the block back.
#[derive(Debug)]
enum Mapping {
    /// To hugepage-rs, which wants the layout again.
    HugeTlb(Layout),
    /// By unmapping this whole range of addresses, of which the block is a part.
    Reserved { start: NonNull<u8>, len: usize },
}

// SAFETY: the value owns its mapping, which belongs to no thread.
unsafe impl Send for SlotMemory {}
// SAFETY: through a shared reference one gets the block's address and size, and nothing is read or written.
unsafe impl Sync for SlotMemory {}

impl SlotMemory {
    /// A block of `bytes`, rounded up to whole 4 KiB pages, from the best source that will give it: the hugetlb
    /// pool, transparent huge pages, small pages. Blocks smaller than a huge page do not ask for one.
    ///
    /// # Errors
    ///
    /// The size is 0 or above 1 TiB, or there is not that much memory.
    pub fn new(bytes: usize) -> Result<Self, SlotMemoryError> {
        if bytes == 0 || bytes > MAX_BYTES {
            return Err(SlotMemoryError::Size { bytes });
        }
        let len = bytes.next_multiple_of(SMALL_PAGE);
        match Self::from_hugetlb_pool(len) {
            Some(memory) => Ok(memory),
            None => Self::from_ordinary_pages(len, len >= HUGE_PAGE),
        }
    }

    /// A block of `bytes`, rounded up to whole 4 KiB pages, in pages of that size.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn small(bytes: usize) -> Result<Self, SlotMemoryError> {
        if bytes == 0 || bytes > MAX_BYTES {
            return Err(SlotMemoryError::Size { bytes });
        }
        Self::from_ordinary_pages(bytes.next_multiple_of(SMALL_PAGE), false)
    }

    /// The first byte of the block.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The size of the block in bytes, a multiple of 4096 and never 0.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// What the block is made of, as the kernel reports it.
    pub fn backing(&self) -> Backing {
        match self.mapping {
            Mapping::HugeTlb(_) => Backing::HugeTlb,
            Mapping::Reserved { .. } if self.huge_bytes >= self.len => Backing::TransparentHuge,
            Mapping::Reserved { .. } => Backing::Small,
        }
    }

    /// How many bytes of the block are in huge pages; with [`Backing::Small`] it can be a part.
    pub fn huge_bytes(&self) -> usize {
        self.huge_bytes
    }

    /// The first rung. `None` whenever it is not certain to succeed: the pool belongs to the host, others draw on
    /// it too, and doing without is always possible.
    fn from_hugetlb_pool(len: usize) -> Option<Self> {
        // hugepage-rs panics where this file has no "Hugepagesize:" line, as in a PV dom0; so look first.
        let pool = HugePool::parse(&fs::read_to_string("/proc/meminfo").ok()?)?;
        if len < pool.page_bytes || len.div_ceil(pool.page_bytes) > pool.free_pages {
            return None;
        }
        let layout = Layout::from_size_align(len, SMALL_PAGE).ok()?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { hugepage_rs::alloc(layout) })?;
        // From here on, dropping `memory` gives the pages back.
        let memory = Self { base, len, huge_bytes: len, mapping: Mapping::HugeTlb(layout) };
        let mapped = len.next_multiple_of(pool.page_bytes);
        keep_private(base, mapped).ok()?;
        // The mapping is MAP_PRIVATE, and where a cgroup limits huge pages a first touch would be SIGBUS; this
        // reports an error instead. A kernel too old for it (before 5.14) has no SEND_ZC to gain from the pool.
        advise(base, mapped, libc::MADV_POPULATE_WRITE).ok()?;
        Some(memory)
    }

    /// The second and third rungs: aligned memory, with `huge` pages asked for or refused, and a look at what came.
    fn from_ordinary_pages(len: usize, huge: bool) -> Result<Self, SlotMemoryError> {
        let refused = |step| move |source| SlotMemoryError::Refused { step, bytes: len, source };
        let page = if huge { HUGE_PAGE } else { SMALL_PAGE };
        let mapped = len.next_multiple_of(page);
        let mut memory = Self::reserve(len, mapped, page).map_err(refused("map"))?;
        keep_private(memory.base, mapped).map_err(refused("prepare"))?;
        // A kernel without transparent huge pages says EINVAL. What came is found out below in any case.
        let wish = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        let _ = advise(memory.base, mapped, wish);
        populate(memory.base, mapped).map_err(refused("populate"))?;
        if let Ok(smaps) = fs::read_to_string("/proc/self/smaps") {
            memory.huge_bytes = anon_huge_bytes(&smaps, memory.base.addr().get()).unwrap_or(0).min(len);
        }
        Ok(memory)
    }

    /// Maps `mapped` bytes aligned to `align`, with an inaccessible page at least on either side: running off the
    /// end faults, and the block stays a mapping of its own, with its own entry in smaps.
    fn reserve(len: usize, mapped: usize, align: usize) -> io::Result<Self> {
        let reserved = mapped + align + 2 * SMALL_PAGE;
        let start = map(ptr::null_mut(), reserved, libc::PROT_NONE, libc::MAP_NORESERVE)?;
        let offset = (start.addr().get() + SMALL_PAGE).next_multiple_of(align) - start.addr().get();
        // SAFETY: `offset <= SMALL_PAGE + align`, so that the block and a page after it lie within `reserved`.
        let base = unsafe { start.add(offset) };
        let mapping = Mapping::Reserved { start, len: reserved };
        // From here on, dropping `memory` unmaps the reservation.
        let memory = Self { base, len, huge_bytes: 0, mapping };
        map(base.as_ptr(), mapped, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED)?;
        Ok(memory)
    }
}

impl Drop for SlotMemory {
    fn drop(&mut self) {
        if heir::is_appointed() {
            // This process is at its end, and somebody may wait for it.
            return;
        }
        match self.mapping {
            // SAFETY: `base` came from `alloc` with this layout, and this is the only place that gives it back.
            Mapping::HugeTlb(layout) => unsafe { hugepage_rs::dealloc(self.base.as_ptr(), layout) },
            Mapping::Reserved { start, len } => {
                // SAFETY: `start` and `len` are those of a mapping that this value owns, and that it hands out
                // only as raw pointers, whose users keep the value alive. Unmapping a whole mapping cannot fail.
                unsafe { libc::munmap(start.as_ptr().cast(), len) };
            }
        }
    }
}

/// Anonymous private memory. With MAP_FIXED among `flags`, `at` must be inside a reservation of the caller's.
fn map(at: *mut u8, len: usize, protection: i32, flags: i32) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: without MAP_FIXED the kernel picks addresses that are free; with it, `reserve` passes a part of the
    // reservation that it has just made and not shown to anybody.
    let mapped = unsafe { libc::mmap(at.cast(), len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(mapped.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// One of the kinds of advice that do not change what memory holds (so not MADV_DONTNEED).
fn advise(base: NonNull<u8>, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the range is a mapping of the caller's, and the advice leaves its contents alone.
    match unsafe { libc::madvise(base.as_ptr().cast(), len, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Leaves the memory out of core dumps, and out of children: a write to a page shared with a child would move the
/// page away from under a registered buffer.
fn keep_private(base: NonNull<u8>, len: usize) -> io::Result<()> {
    advise(base, len, libc::MADV_DONTDUMP)?;
    advise(base, len, libc::MADV_DONTFORK)
}

/// Makes every page present and writable. The memory must be all zero.
fn populate(base: NonNull<u8>, len: usize) -> io::Result<()> {
    match advise(base, len, libc::MADV_POPULATE_WRITE) {
        // Before Linux 5.14.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            for page in (0..len).step_by(SMALL_PAGE) {
                // SAFETY: within the mapping, which nobody else knows of yet. Volatile, or it would be left out.
                unsafe { base.add(page).write_volatile(0) };
            }
            Ok(())
        }
        other => other,
    }
}

/// The hugetlb pool of the default page size, as /proc/meminfo shows it.
#[derive(Debug, PartialEq, Eq)]
struct HugePool {
    page_bytes: usize,
    /// Neither in use nor promised to a mapping.
    free_pages: usize,
}

impl HugePool {
    fn parse(meminfo: &str) -> Option<Self> {
        let field = |name| meminfo.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let page_kib: usize = field("Hugepagesize:")?.strip_suffix(" kB")?.trim().parse().ok()?;
        let free: usize = field("HugePages_Free:")?.parse().ok()?;
        let reserved: usize = field("HugePages_Rsvd:")?.parse().ok()?;
        let page_bytes = page_kib.checked_mul(1024).filter(|bytes| bytes.is_power_of_two())?;
        Some(Self { page_bytes, free_pages: free.saturating_sub(reserved) })
    }
}

/// How much of the mapping that begins at `start` is in transparent huge pages, by the text of /proc/self/smaps.
fn anon_huge_bytes(smaps: &str, start: usize) -> Option<usize> {
    let header = format!("{start:x}-");
    let mapping = smaps.lines().skip_while(|line| !line.starts_with(&header));
    let kib = mapping.skip(1).find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// The lines of /proc/self/smaps for the mapping `base..base + len`, if there is just that.
    fn smaps_entry(base: usize, len: usize) -> Option<String> {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let header = format!("{base:x}-{:x} ", base + len);
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&header)).peekable();
        lines.peek()?;
        let end = |line: &&str| line.starts_with("VmFlags:");
        let flags = lines.clone().find(end)?;
        Some(lines.take_while(|line| !end(line)).chain([flags]).collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn a_block_is_aligned_zeroed_private_and_gone_after_its_drop() {
        // A length that no other test uses, so that the entry in smaps cannot be another's.
        const LEN: usize = 37 * SMALL_PAGE;
        let memory = SlotMemory::new(LEN - 1).unwrap();
        let base = memory.as_ptr();
        assert_eq!((memory.len(), base.addr() % SMALL_PAGE), (LEN, 0));
        assert_eq!((memory.backing(), memory.huge_bytes()), (Backing::Small, 0));
        // SAFETY: the block is all there, initialised, and this test's alone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(base, LEN) };
        assert!(bytes.iter().all(|&byte| byte == 0));
        bytes.fill(1);
        let entry = smaps_entry(base.addr(), LEN).expect("a mapping of its own");
        assert!(entry.contains("Rss:                 148 kB"), "{entry}");
        let flags = entry.lines().last().unwrap();
        assert!(flags.contains(" dc") && flags.contains(" dd"), "no fork, no dump: {flags}");
        drop(memory);
        assert_eq!(smaps_entry(base.addr(), LEN), None);
    }

    #[test]
    fn a_large_block_says_what_it_is_made_of() {
        let memory = SlotMemory::new(2 * HUGE_PAGE + 1).unwrap();
        println!("3 huge pages' worth came as {}, {} bytes huge", memory.backing(), memory.huge_bytes());
        assert_eq!((memory.len(), memory.as_ptr().addr() % HUGE_PAGE), (2 * HUGE_PAGE + SMALL_PAGE, 0));
        let all_huge = memory.huge_bytes() == memory.len();
        assert_eq!(all_huge, memory.backing() != Backing::Small);
    }

    #[test]
    fn a_small_block_has_no_huge_page_however_large_it_is() {
        let memory = SlotMemory::small(4 * HUGE_PAGE).unwrap();
        assert_eq!((memory.backing(), memory.huge_bytes()), (Backing::Small, 0));
        assert!(matches!(SlotMemory::small(0), Err(SlotMemoryError::Size { .. })));
    }

    #[test]
    fn the_hugetlb_pool_is_used_when_it_has_the_pages() {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        match HugePool::parse(&meminfo) {
            Some(pool) if pool.page_bytes == HUGE_PAGE && pool.free_pages >= 8 => {
                let memory = SlotMemory::new(HUGE_PAGE + 1).unwrap();
                assert_eq!(memory.backing(), Backing::HugeTlb);
            }
            pool => eprintln!("SKIPPED: needs 8 free hugetlb pages of 2 MiB; the pool is {pool:?}"),
        }
    }

    #[test]
    fn sizes_that_make_no_sense_are_errors() {
        for bytes in [0, MAX_BYTES + 1, usize::MAX] {
            assert!(matches!(SlotMemory::new(bytes), Err(SlotMemoryError::Size { .. })));
        }
    }

    #[test]
    fn the_pool_counts_only_pages_that_nobody_was_promised() {
        let meminfo = "HugePages_Total: 9\nHugePages_Free: 7\nHugePages_Rsvd: 5\nHugepagesize:    2048 kB\n";
        assert_eq!(HugePool::parse(meminfo), Some(HugePool { page_bytes: HUGE_PAGE, free_pages: 2 }));
        assert_eq!(HugePool::parse(&meminfo.replace("Hugepagesize", "x")), None);
        assert_eq!(HugePool::parse(&meminfo.replace("2048 kB", "2 MB")), None);
    }

    #[test]
    fn smaps_is_read_for_the_right_mapping() {
        let smaps =
            "a000-b000 rw-p 0 0 0\nAnonHugePages: 0 kB\nba000-bb000 rw-p 0 0 0\nAnonHugePages: 2048 kB\n";
        assert_eq!(anon_huge_bytes(smaps, 0xba000), Some(HUGE_PAGE));
        assert_eq!(anon_huge_bytes(smaps, 0xa000), Some(0));
        assert_eq!(anon_huge_bytes(smaps, 0xb000), None);
    }
}
