//! Frames of another domain, mapped into this process to be read.
//!
//! A frame stays allocated as long as it is mapped, also if the guest has given it up meanwhile: the mapping then shows
//! the old frame, and Xen goes on counting it among the guest's. Pages that could not be mapped would raise SIGBUS, so
//! none of them is ever touched: each access asks first.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::CallError;
use super::abi::DomId;
use super::privcmd::Privcmd;
use super::tally::{Call, Tally};
use crate::page::{PAGE_SIZE, is_zero};

/// How often frames that are paged out are asked for again, and how long to wait before each time.
const PAGED_OUT_TRIES: usize = 50;
const PAGED_OUT_WAIT: Duration = Duration::from_micros(100);

/// Mapped frames. Unmapped when dropped.
pub struct ForeignMapping {
    base: NonNull<u8>,
    frames: usize,
    /// A bit for each frame that is there.
    there: Box<[u64]>,
    tally: Arc<Tally>,
    #[cfg(test)]
    on_unmap: Option<Box<dyn FnOnce() + Send>>,
}

// SAFETY: the mapping is owned by this value and valid until it is dropped, whichever thread uses it; its bytes are only
// ever copied out.
unsafe impl Send for ForeignMapping {}
// SAFETY: as above; nothing in a shared ForeignMapping changes after construction.
unsafe impl Sync for ForeignMapping {}

impl ForeignMapping {
    /// Maps `gfns` of a domain, to be read. `errors` has a place for each and gets 0 or a negative error number; a frame
    /// with an error is not there. Frames that are paged out are waited for, a few milliseconds at most.
    pub fn map(
        privcmd: &Privcmd,
        domid: DomId,
        gfns: &[u64],
        errors: &mut [i32],
        tally: &Arc<Tally>,
    ) -> Result<Self, CallError> {
        let frames = gfns.len();
        let failed = |source| CallError::Map { domid, frames, source };
        let mut mapping = Self::reserve(privcmd, frames, tally).map_err(failed)?;
        tally.note(Call::MapBatch);
        // SAFETY: the whole of a mapping of this file that was just made.
        let mut outcome = unsafe { privcmd.map_batch(domid, gfns, mapping.base.as_ptr() as u64, errors) };
        for _ in 0..PAGED_OUT_TRIES {
            match outcome {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                other => {
                    other.map_err(failed)?;
                    mapping.note_errors(errors);
                    return Ok(mapping);
                }
            }
            std::thread::sleep(PAGED_OUT_WAIT);
            outcome = mapping.retry_paged_out(privcmd, domid, gfns, errors);
        }
        let index = errors.iter().position(|error| *error == -libc::ENOENT).unwrap_or(0);
        Err(CallError::PagedOut { domid, gfn: gfns.get(index).copied().unwrap_or(0) })
    }

    /// A mapping of the device without any frames.
    fn reserve(privcmd: &Privcmd, frames: usize, tally: &Arc<Tally>) -> io::Result<Self> {
        tally.note(Call::Mmap);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory; one of no length is
        // refused.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                frames * PAGE_SIZE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                privcmd.as_fd().as_raw_fd(),
                0,
            )
        };
        Self::adopt(base, frames, tally)
    }

    fn adopt(base: *mut libc::c_void, frames: usize, tally: &Arc<Tally>) -> io::Result<Self> {
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(ForeignMapping {
            base: NonNull::new(base.cast()).expect("mmap without MAP_FIXED never returns null"),
            frames,
            there: vec![0; frames.div_ceil(64)].into_boxed_slice(),
            tally: tally.clone(),
            #[cfg(test)]
            on_unmap: None,
        })
    }

    /// Asks once more for each frame that was paged out.
    fn retry_paged_out(
        &self,
        privcmd: &Privcmd,
        domid: DomId,
        gfns: &[u64],
        errors: &mut [i32],
    ) -> io::Result<()> {
        let mut outcome = Ok(());
        for index in 0..self.frames {
            if errors[index] != -libc::ENOENT {
                continue;
            }
            self.tally.note(Call::MapBatch);
            let address = self.base.as_ptr() as u64 + (index * PAGE_SIZE) as u64;
            let one = index..index + 1;
            // SAFETY: within this mapping of this file, whose first call is behind it; the page failed, so nothing is there.
            match unsafe { privcmd.map_batch(domid, &gfns[one.clone()], address, &mut errors[one]) } {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => outcome = Err(error),
                other => other?,
            }
        }
        outcome
    }

    fn note_errors(&mut self, errors: &[i32]) {
        let mut mapped = 0;
        for (index, error) in errors.iter().enumerate() {
            if *error == 0 {
                self.there[index / 64] |= 1 << (index % 64);
                mapped += 1;
            }
        }
        self.tally.add(Call::FramesMapped, mapped);
        self.tally.add(Call::FramesRefused, self.frames as u64 - mapped);
    }

    /// Frames asked for.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Whether the frame with this index is there; one beyond the end is not.
    pub fn has(&self, index: usize) -> bool {
        index < self.frames && self.there[index / 64] >> (index % 64) & 1 == 1
    }

    /// Where a frame is. Panics if it is not there.
    fn page(&self, index: usize) -> *const u8 {
        assert!(self.has(index), "frame {index} of {} is not mapped", self.frames);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(index * PAGE_SIZE) }
    }

    /// The address of a frame, for a system call that checks addresses itself. Panics if it is not there.
    pub(super) fn address(&self, index: usize) -> *const u8 {
        self.page(index)
    }

    /// Copies a frame out and says whether the copy is all zero. The guest may be writing it: the copy can then be torn,
    /// and the dirty log says so. Panics if it is not there.
    ///
    /// The foreign memory is read once. That the copy is looked at, and not the frame, costs nothing for most pages, whose
    /// first bytes are not zero, and a walk through the first-level cache for a zero page.
    pub fn copy(&self, index: usize, into: &mut [u8; PAGE_SIZE]) -> bool {
        let from = self.page(index);
        // SAFETY: a whole mapped page that nothing of ours aliases mutably. Stores of the guest may interleave; what that
        // tears is sent again.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), PAGE_SIZE) };
        is_zero(into)
    }

    /// Whether a frame reads as all zero now; looks no further than the first 64 bytes that are not. Panics if it is not
    /// there.
    pub fn is_zero(&self, index: usize) -> bool {
        let page = self.page(index).cast::<[u64; 8]>();
        (0..PAGE_SIZE / 64).all(|line| {
            // SAFETY: line by line within the mapped, page-aligned page; volatile because the guest may store to it at any
            // time.
            let words = unsafe { page.add(line).read_volatile() };
            words.iter().fold(0, |all, word| all | word) == 0
        })
    }

    /// Whether a frame reads the same as one of another mapping. Panics if either is not there.
    pub fn is_same(&self, index: usize, other: &ForeignMapping, other_index: usize) -> bool {
        let mine = self.page(index).cast::<[u64; 8]>();
        let theirs = other.page(other_index).cast::<[u64; 8]>();
        (0..PAGE_SIZE / 64).all(|line| {
            // SAFETY: as in `is_zero`, for both pages.
            unsafe { mine.add(line).read_volatile() == theirs.add(line).read_volatile() }
        })
    }

    /// Asks for a frame's first cache lines ahead of its use, if it is there.
    pub fn prefetch(&self, index: usize) {
        if !self.has(index) {
            return;
        }
        let page = self.page(index);
        for line in 0..4 {
            // SAFETY: within the mapped page. The reference is to a byte that is only prefetched and never read through it.
            crate::sys::simd::prefetch(unsafe { &*page.add(line * 64) });
        }
    }
}

impl Drop for ForeignMapping {
    fn drop(&mut self) {
        self.tally.note(Call::Munmap);
        // SAFETY: the mapping was made in `reserve` (or, for tests, `of_file`) and is unmapped once, here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.frames * PAGE_SIZE) };
        #[cfg(test)]
        if let Some(on_unmap) = self.on_unmap.take() {
            on_unmap();
        }
    }
}

#[cfg(test)]
impl ForeignMapping {
    /// A mapping like a real one of pages of a file, by page number in it; the kernel kills who touches one that is None,
    /// as with a real one. `on_unmap` is called when it has gone.
    pub(crate) fn of_file(
        file: impl AsFd,
        pages: &[Option<u64>],
        tally: &Arc<Tally>,
        on_unmap: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Self> {
        tally.note(Call::Mmap);
        let (none, anonymous) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), pages.len() * PAGE_SIZE, none, anonymous, -1, 0) };
        let mut mapping = Self::adopt(base, pages.len(), tally)?;
        let mut errors = vec![-libc::EINVAL; pages.len()];
        for (index, page) in pages.iter().enumerate() {
            let Some(page) = page else { continue };
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let offset = (*page as usize * PAGE_SIZE) as libc::off_t;
            let fd = file.as_fd().as_raw_fd();
            // SAFETY: replaces a page of the mapping just made, which nobody has seen yet.
            let at = unsafe { mapping.base.as_ptr().add(index * PAGE_SIZE) };
            // SAFETY: as above.
            let mapped = unsafe { libc::mmap(at.cast(), PAGE_SIZE, libc::PROT_READ, flags, fd, offset) };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            errors[index] = 0;
        }
        mapping.note_errors(&errors);
        mapping.on_unmap = Some(on_unmap);
        Ok(mapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Pfn;
    use crate::sys::guest_memory::GuestMemory;

    fn mapped(memory: &GuestMemory, pages: &[Option<u64>]) -> ForeignMapping {
        ForeignMapping::of_file(memory.fd(), pages, &Arc::default(), Box::new(|| ())).unwrap()
    }

    #[test]
    fn a_frame_is_copied_as_it_is_now_and_zero_is_noticed() {
        let memory = GuestMemory::create(4).unwrap();
        let mapping = mapped(&memory, &[Some(3), None, Some(1)]);
        memory.writer().unwrap().bytes()[2 * PAGE_SIZE - 1] = 5;
        let mut page = [9; PAGE_SIZE];
        assert!(!mapping.copy(2, &mut page));
        assert_eq!((page[0], page[PAGE_SIZE - 1]), (0, 5));
        assert!(mapping.copy(0, &mut page) && page == [0; PAGE_SIZE]);
        assert!(mapping.is_zero(0) && !mapping.is_zero(2));
        let same = mapped(&memory, &[Some(1)]);
        assert!(mapping.is_same(2, &same, 0) && !mapping.is_same(0, &same, 0));
        memory.copy_page(Pfn(1), &mut page);
        assert_eq!(page[PAGE_SIZE - 1], 5);
        mapping.prefetch(0);
        mapping.prefetch(1);
    }

    #[test]
    fn a_frame_that_is_not_there_is_refused_before_it_is_touched() {
        let memory = GuestMemory::create(1).unwrap();
        let mapping = mapped(&memory, &[Some(0), None]);
        assert!(mapping.has(0) && !mapping.has(1) && !mapping.has(2));
        for index in [1, 2, 64] {
            let touch = std::panic::AssertUnwindSafe(|| mapping.is_zero(index));
            assert!(std::panic::catch_unwind(touch).is_err(), "frame {index}");
        }
    }

    #[test]
    fn every_mapping_is_counted_and_unmapped_once() {
        let memory = GuestMemory::create(2).unwrap();
        let tally = Arc::<Tally>::default();
        let gone = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = gone.clone();
        let on_unmap = Box::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        let pages = [Some(0), Some(1), None];
        drop(ForeignMapping::of_file(memory.fd(), &pages, &tally, on_unmap).unwrap());
        let counts = tally.counts();
        assert_eq!((counts.mmap, counts.munmap), (1, 1));
        assert_eq!((counts.frames_mapped, counts.frames_refused), (2, 1));
        assert_eq!(gone.load(std::sync::atomic::Ordering::Relaxed), 1);
    }
}
