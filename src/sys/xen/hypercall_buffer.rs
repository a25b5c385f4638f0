//! Memory that Xen reads and writes during a hypercall. Xen uses the caller's own addresses and cannot fault pages in,
//! so the memory has to be there and must not move.
//!
//! It comes from /dev/xen/hypercall (Linux 4.18 and later), whose pages the kernel neither moves nor copies on fork.
//! Without that device it is locked memory that a child does not inherit. The kernel may still move that, so that a
//! call may end with EFAULT and has to be made again ([`HypercallBuffer::may_fault`]).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::CallError;
use super::abi::Plain;
use crate::page::PAGE_SIZE;

/// The device that buffers come from.
pub const DEVICE: &str = "/dev/xen/hypercall";

/// Whole pages, zeroed at first, unmapped when dropped.
pub struct HypercallBuffer {
    base: NonNull<u64>,
    bytes: usize,
    from_device: bool,
}

// SAFETY: the mapping is owned by this value and valid until it is dropped, whichever thread has it.
unsafe impl Send for HypercallBuffer {}

impl HypercallBuffer {
    /// A buffer of at least `bytes`, from `device` if there is one.
    pub fn new(device: Option<&File>, bytes: usize) -> Result<Self, CallError> {
        let bytes = bytes.max(1).next_multiple_of(PAGE_SIZE);
        Self::map(device, bytes).map_err(|source| CallError::Buffer { bytes, source })
    }

    fn map(device: Option<&File>, bytes: usize) -> io::Result<Self> {
        let (flags, fd) = match device {
            Some(device) => (libc::MAP_SHARED, device.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED, -1),
        };
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, rights, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u64>()).expect("mmap without MAP_FIXED never returns null");
        let mut buffer = HypercallBuffer { base, bytes, from_device: device.is_some() };
        if device.is_none() {
            // SAFETY: the range is the mapping just made. In a forked child a write would move the page away from under
            // a hypercall of this process.
            if unsafe { libc::madvise(buffer.base.as_ptr().cast(), bytes, libc::MADV_DONTFORK) } != 0 {
                return Err(io::Error::last_os_error());
            }
            // Writing each page makes it present.
            buffer.words_mut().fill(0);
        }
        Ok(buffer)
    }

    /// Whether the kernel may take pages of the buffer away for a moment, so that Xen answers EFAULT.
    pub fn may_fault(&self) -> bool {
        !self.from_device
    }

    /// What to pass to Xen.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: a buffer has at least a page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The contents, word by word.
    pub fn words(&self) -> &[u64] {
        // SAFETY: exactly the mapping, readable and aligned, which lives as long as the borrow. Xen writes it only during a
        // hypercall, for which the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes / 8) }
    }

    /// The contents, word by word, to be changed.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes / 8) }
    }

    /// The first `len` bytes. Panics if there are fewer.
    pub fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.bytes, "{len} bytes of a buffer of {}", self.bytes);
        // SAFETY: within the mapping, as just checked; any byte is a u8; and as in `words`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), len) }
    }

    /// Puts a struct at the front.
    pub fn put<T: Plain>(&mut self, value: T) {
        const { assert!(size_of::<T>() <= PAGE_SIZE && align_of::<T>() <= 8) };
        // SAFETY: the mapping has at least a page and is aligned to one, and it is borrowed mutably.
        unsafe { self.base.as_ptr().cast::<T>().write(value) }
    }

    /// The struct at the front.
    pub fn get<T: Plain>(&self) -> T {
        const { assert!(size_of::<T>() <= PAGE_SIZE && align_of::<T>() <= 8) };
        // SAFETY: the mapping has at least a page, which is aligned, was zeroed at first, and holds a T whatever its bits are.
        unsafe { self.base.as_ptr().cast::<T>().read() }
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and is unmapped once, here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::xen::abi::hvm::HvmParam;

    #[test]
    fn without_the_device_the_memory_is_locked_and_no_child_has_it() {
        let mut buffer = HypercallBuffer::new(None, 5000).unwrap();
        assert_eq!((buffer.len(), buffer.may_fault()), (8192, true));
        assert!(buffer.words().iter().all(|word| *word == 0));
        let param = HvmParam { domid: 7, pad: 0, index: 12, value: 0x1234 };
        buffer.put(param);
        let back: HvmParam = buffer.get();
        assert_eq!((back.domid, back.index, back.value), (7, 12, 0x1234));
        assert_eq!(buffer.words()[1], 0x1234);
        assert_eq!(buffer.bytes(8192).len(), 8192);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", buffer.address());
        let mut flags = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = flags.find(|line| line.starts_with("VmFlags")).unwrap();
        assert!(flags.contains(" lo") && flags.contains(" dc"), "{flags}");
    }
}
