//! Whether this kernel would send straight from another domain's frames. No kernel does today: mappings of privcmd are
//! VM_IO and VM_PFNMAP, which the kernel refuses to pin with EFAULT. This asks, so that one that does is noticed.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::IoUring;

use super::foreign::ForeignMapping;
use crate::page::PAGE_SIZE;

/// What came of trying to pin a foreign page.
pub struct Pinning {
    /// By registering it with an io_uring.
    pub register_buffers: io::Result<()>,
    /// By vmsplice.
    pub vmsplice: io::Result<()>,
}

/// Tries to pin a frame. Panics if it is not there.
pub fn try_to_pin(mapping: &ForeignMapping, index: usize) -> Pinning {
    let page = libc::iovec { iov_base: mapping.address(index).cast_mut().cast(), iov_len: PAGE_SIZE };
    Pinning { register_buffers: try_to_register(&page), vmsplice: try_to_splice(&page) }
}

fn try_to_register(page: &libc::iovec) -> io::Result<()> {
    let ring = IoUring::new(2)?;
    // SAFETY: the page stays mapped for longer than the ring lives, and nothing is ever read into it.
    unsafe { ring.submitter().register_buffers(std::slice::from_ref(page)) }
}

fn try_to_splice(page: &libc::iovec) -> io::Result<()> {
    let (_reader, writer) = io::pipe()?;
    // SAFETY: the kernel reads one iovec, whose page is mapped and outlives the pipe, which nobody reads.
    let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), page, 1, libc::SPLICE_F_NONBLOCK) };
    if spliced < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::guest_memory::GuestMemory;
    use std::sync::Arc;

    #[test]
    fn pages_of_a_file_can_be_pinned() {
        let memory = GuestMemory::create(1).unwrap();
        let mapping =
            ForeignMapping::of_file(memory.fd(), &[Some(0)], &Arc::default(), Box::new(|| ())).unwrap();
        let pinning = try_to_pin(&mapping, 0);
        assert!(pinning.vmsplice.is_ok(), "{:?}", pinning.vmsplice);
    }
}
