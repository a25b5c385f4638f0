//! Linux's privcmd: the door to hypercalls and to other domains' frames. Who holds it open rules the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use super::CallError;
use super::abi::DomId;
use super::abi::privcmd::{HYPERCALL, Hypercall, MMAPBATCH_V2, MmapBatchV2};

/// Where the device is; the second is where old kernels have it.
pub const DEVICES: [&str; 2] = ["/dev/xen/privcmd", "/proc/xen/privcmd"];

/// An open privcmd.
pub struct Privcmd(File);

impl Privcmd {
    /// Opens the device.
    pub fn open() -> Result<Self, CallError> {
        let path = DEVICES.into_iter().find(|path| Path::new(path).exists()).unwrap_or(DEVICES[0]);
        Self::open_at(path)
    }

    /// Opens the device at `path`. It is closed on exec, as all files opened by Rust's own library are.
    pub fn open_at(path: &str) -> Result<Self, CallError> {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Privcmd(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(CallError::NotFound { path: path.to_owned() })
            }
            Err(source) => Err(CallError::Open { path: path.to_owned(), source }),
        }
    }

    /// Makes a hypercall; its result, which may need more than 31 bits.
    ///
    /// # Safety
    /// What the arguments point to has to be what the hypercall expects there, in memory that stays for the call and
    /// that nobody else uses.
    pub unsafe fn hypercall(&self, op: u64, arg: [u64; 5]) -> io::Result<i64> {
        let mut call = Hypercall { op, arg };
        // The C library's ioctl cuts the result down to an int, so this is the bare system call.
        // SAFETY: the kernel reads one Hypercall, which outlives the call; what it points to is the caller's promise.
        let result = unsafe { libc::syscall(libc::SYS_ioctl, self.0.as_raw_fd(), HYPERCALL, &raw mut call) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// Maps `gfns` of a domain to `address` on, a page each, and notes for each whether it could be: 0 or a negative error
    /// number. An error of the call itself with ENOENT says that some frames are paged out.
    ///
    /// # Safety
    /// `address` has to be that of a mapping of this file, and the pages there unmapped as yet: all of the mapping if
    /// this is the first call for it.
    pub unsafe fn map_batch(
        &self,
        domid: DomId,
        gfns: &[u64],
        address: u64,
        errors: &mut [i32],
    ) -> io::Result<()> {
        assert_eq!(gfns.len(), errors.len(), "a result for each frame");
        let num = u32::try_from(gfns.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        let mut batch = MmapBatchV2 {
            num,
            dom: domid,
            pad: 0,
            addr: address,
            arr: gfns.as_ptr(),
            err: errors.as_mut_ptr(),
        };
        // SAFETY: the kernel reads `num` frame numbers and writes `num` results, which is how long both are; where it maps is
        // the caller's promise.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), MMAPBATCH_V2, &raw mut batch) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Privcmd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_asks_whether_this_is_a_dom0() {
        let error = Privcmd::open_at("/nonexistent/privcmd").err().unwrap().to_string();
        assert!(error.contains("/nonexistent/privcmd: not found; is this a Xen dom0"), "{error}");
        assert!(error.contains("pagecast probe"), "{error}");
    }

    #[test]
    fn what_is_no_privcmd_refuses_a_hypercall_with_an_errno() {
        let null = Privcmd::open_at("/dev/null").unwrap();
        // SAFETY: no argument is a pointer, and /dev/null has no such ioctl.
        let error = unsafe { null.hypercall(17, [0; 5]) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        // SAFETY: /dev/null maps nothing.
        let error = unsafe { null.map_batch(1, &[0], 0, &mut [0]) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
