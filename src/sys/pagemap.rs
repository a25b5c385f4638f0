//! PAGEMAP_SCAN: which pages of a process were written since they were last protected. With `WP_MATCHING` it is
//! an atomic get-and-clear, as Xen's SHADOW_OP_CLEAN; without, a look, as SHADOW_OP_PEEK. Layouts: linux/fs.h of
//! Linux 6.7 and later.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use bitflags::bitflags;
use memoffset::offset_of;

use super::TrackingError;

bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct ScanFlags: u64 {
        const WP_MATCHING = 1 << 0;
        const CHECK_WPASYNC = 1 << 1;
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Category: u64 {
        const WRITTEN = 1 << 1;
        const FILE = 1 << 2;
        const PRESENT = 1 << 3;
        const SWAPPED = 1 << 4;
    }
}

const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

/// Ranges taken from the kernel by one call.
const REGIONS: usize = 16384;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = {
    assert!(size_of::<PageRegion>() == 24);
    assert!(size_of::<PmScanArg>() == 96);
    assert!(offset_of!(PmScanArg, walk_end) == 32);
    assert!(offset_of!(PmScanArg, category_mask) == 72);
};

/// What a scan does besides looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Report written pages and protect them again, atomically for each page.
    GetAndClear,
    /// Report only.
    Peek,
}

/// Which pages a scan reports, and which of those it protects again: the written ones.
#[derive(Clone, Copy)]
struct Wanted {
    flags: ScanFlags,
    all_of: Category,
    any_of: Category,
    told: Category,
}

/// The page map of a process whose memory is registered with [`super::userfaultfd`].
pub struct Pagemap {
    file: OwnedFd,
    regions: Vec<PageRegion>,
}

impl Pagemap {
    /// The page map of this process, to be handed to whoever tracks it.
    pub fn of_self() -> io::Result<OwnedFd> {
        Ok(File::open("/proc/self/pagemap")?.into())
    }

    /// The page map of another process, which takes the right to trace it. It stays that of the program that the process
    /// runs now.
    pub fn of_process(pid: i32) -> io::Result<Self> {
        Ok(Self::new(File::open(format!("/proc/{pid}/pagemap"))?.into()))
    }

    /// Uses the page map behind `file`.
    pub fn new(file: OwnedFd) -> Self {
        Pagemap { file, regions: vec![PageRegion::default(); REGIONS] }
    }

    /// Calls `found(start, end)` with each run of addresses in `[start, end)` written since the last
    /// get-and-clear, ascending. The first get-and-clear of a range arms it: what that reports says nothing yet.
    pub fn scan(
        &mut self,
        scan: Scan,
        start: u64,
        end: u64,
        found: &mut dyn FnMut(u64, u64),
    ) -> Result<(), TrackingError> {
        let flags = match scan {
            Scan::GetAndClear => ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC,
            Scan::Peek => ScanFlags::CHECK_WPASYNC,
        };
        // These two, with nothing else set, take the kernel's short loop.
        let (written, none) = (Category::WRITTEN, Category::empty());
        let wanted = Wanted { flags, all_of: written, any_of: none, told: written };
        self.walk(wanted, start, end, &mut |from, to, _| found(from, to)).map_err(scan_error)
    }

    /// As [`Pagemap::scan`] with get-and-clear, for present pages only: one that was never touched is neither
    /// reported nor protected, and counts as written when it first is touched. EPERM: a mapping in the range is not
    /// registered.
    pub fn take_written_present(
        &mut self,
        start: u64,
        end: u64,
        found: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let flags = ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC;
        let all_of = Category::WRITTEN | Category::PRESENT;
        let wanted = Wanted { flags, all_of, any_of: Category::empty(), told: Category::WRITTEN };
        self.walk(wanted, start, end, &mut |from, to, _| found(from, to))
    }

    /// What [`Pagemap::take_written_present`] would report, and leaves the log as it is.
    pub fn peek_written_present(
        &mut self,
        start: u64,
        end: u64,
        found: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let all_of = Category::WRITTEN | Category::PRESENT;
        let flags = ScanFlags::CHECK_WPASYNC;
        let wanted = Wanted { flags, all_of, any_of: Category::empty(), told: Category::WRITTEN };
        self.walk(wanted, start, end, &mut |from, to, _| found(from, to))
    }

    /// Calls `found(start, end, written)` with the populated runs of a range, those in swap among them, and clears
    /// the log of the written ones. What was populated before and is not reported now has been given back to the
    /// kernel: it reads as zeroes. EPERM as in [`Pagemap::take_written_present`].
    pub fn take_populated(
        &mut self,
        start: u64,
        end: u64,
        found: &mut dyn FnMut(u64, u64, bool),
    ) -> io::Result<()> {
        let flags = ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC;
        let any_of = Category::PRESENT | Category::SWAPPED;
        let wanted = Wanted { flags, all_of: Category::empty(), any_of, told: Category::WRITTEN };
        self.walk(wanted, start, end, &mut |from, to, told| found(from, to, told.contains(Category::WRITTEN)))
    }

    /// Clears the log of a range, its holes included: a page that is only read later does not count as written. EPERM as
    /// in [`Pagemap::take_written_present`].
    pub fn take_written(&mut self, start: u64, end: u64, found: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let flags = ScanFlags::WP_MATCHING | ScanFlags::CHECK_WPASYNC;
        let (written, none) = (Category::WRITTEN, Category::empty());
        let wanted = Wanted { flags, all_of: written, any_of: none, told: written };
        self.walk(wanted, start, end, &mut |from, to, _| found(from, to))
    }

    /// The runs of a range of shared memory that are in the page table, written or not: present, or just being moved to
    /// another frame by the kernel (compaction). Such a page is not present for a moment, and not of use as SWAPPED: the
    /// marks of protected holes are that too.
    pub fn touched(&mut self, start: u64, end: u64, found: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let any_of = Category::PRESENT | Category::FILE;
        let (none, told) = (Category::empty(), Category::PRESENT | Category::FILE);
        let wanted = Wanted { flags: ScanFlags::empty(), all_of: none, any_of, told };
        self.walk(wanted, start, end, &mut |from, to, _| found(from, to))
    }

    fn walk(
        &mut self,
        wanted: Wanted,
        start: u64,
        end: u64,
        found: &mut dyn FnMut(u64, u64, Category),
    ) -> io::Result<()> {
        let mut from = start;
        while from < end {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: wanted.flags.bits(),
                start: from,
                end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: wanted.all_of.bits(),
                category_anyof_mask: wanted.any_of.bits(),
                return_mask: wanted.told.bits(),
            };
            // SAFETY: the kernel reads and writes one PmScanArg and writes at most vec_len regions, both alive
            // for the call.
            let filled = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
            if filled < 0 {
                return Err(io::Error::last_os_error());
            }
            let filled = filled as usize;
            for region in &self.regions[..filled] {
                found(region.start, region.end, Category::from_bits_truncate(region.categories));
            }
            // walk_end is only right when the vector is full: otherwise it can lag behind a scan that is done.
            if filled < self.regions.len() {
                return Ok(());
            }
            from = arg.walk_end;
        }
        Ok(())
    }
}

/// What a failed scan means.
pub fn scan_error(error: io::Error) -> TrackingError {
    match error.raw_os_error() {
        Some(libc::ENOTTY | libc::EINVAL) => {
            TrackingError::Kernel("it has no PAGEMAP_SCAN; Linux 6.7 or later has".to_owned())
        }
        Some(libc::EPERM) => TrackingError::Rights(
            "the guest's memory is not registered for tracking, or its page map may not be scanned"
                .to_owned(),
        ),
        _ => TrackingError::Io("scan the guest's page map", error),
    }
}
