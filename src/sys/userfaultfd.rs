//! userfaultfd in asynchronous write-protect mode: the kernel notes each page's first write by itself and lets
//! the writer go on. Layouts and numbers: linux/userfaultfd.h of Linux 6.7 and later.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use bitflags::bitflags;
use memoffset::offset_of;

use super::TrackingError;

bitflags! {
    /// What userfaultfd can do (`UFFD_FEATURE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Features: u64 {
        const PAGEFAULT_FLAG_WP = 1 << 0;
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        const WP_UNPOPULATED = 1 << 13;
        const WP_ASYNC = 1 << 15;
    }
}

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;

const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: libc::c_ulong = 0xC020_AA00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_AA01;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

const _: () = {
    assert!(size_of::<UffdioApi>() == 24);
    assert!(size_of::<UffdioRange>() == 16);
    assert!(size_of::<UffdioRegister>() == 32);
    assert!(offset_of!(UffdioRegister, mode) == 16);
};

/// A userfaultfd: of this process, or of another that has opened it ([`super::ptrace`]). Its ranges are tracked until
/// it is dropped; the kernel sees to that also when its owner is killed.
pub struct Userfaultfd(OwnedFd);

/// Why a range of another process's memory is not tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRegistered {
    /// It is not mapped any more, or the process has ended or become another program.
    Gone,
    /// Another userfaultfd has hold of it.
    Busy,
    /// It is of a kind that cannot be.
    Unsuitable,
}

impl Userfaultfd {
    /// Opens one with asynchronous write protection. Only faults of user mode are wanted, which an
    /// unprivileged process may have.
    pub fn open() -> Result<Self, TrackingError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: the system call takes one integer and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ENOSYS) => {
                    TrackingError::Kernel("it was built without CONFIG_USERFAULTFD".to_owned())
                }
                Some(libc::EPERM) => TrackingError::Rights(
                    "userfaultfd is forbidden here (seccomp or a container profile); allow the system call"
                        .to_owned(),
                ),
                _ => TrackingError::Io("open userfaultfd", error),
            });
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        Self::adopt(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Takes over one as it came from the kernel. Its memory is that of the process that opened it.
    pub fn adopt(fd: OwnedFd) -> Result<Self, TrackingError> {
        let wanted = Features::PAGEFAULT_FLAG_WP
            | Features::WP_HUGETLBFS_SHMEM
            | Features::WP_UNPOPULATED
            | Features::WP_ASYNC;
        let mut api = UffdioApi { api: UFFD_API, features: wanted.bits(), ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one UffdioApi, which outlives the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) } != 0 {
            return Err(TrackingError::Kernel(
                "it has no asynchronous write-protect tracking (UFFD_FEATURE_WP_ASYNC); Linux 6.7 or later has"
                    .to_owned(),
            ));
        }
        Ok(Userfaultfd(fd))
    }

    /// Begins to note writes to `[start, start + len)`, a range of one mapping of this process.
    pub fn register(&self, start: *mut u8, len: usize) -> Result<(), TrackingError> {
        self.write_protect(start as u64, len as u64).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TrackingError::Kernel(
                "it cannot write-protect shared memory (CONFIG_PTE_MARKER_UFFD_WP is off)".to_owned(),
            ),
            _ => TrackingError::Io("register guest memory with userfaultfd", error),
        })
    }

    /// Begins to note writes to a range of addresses of the process that opened this: mappings that touch. Ranges that
    /// are registered already stay so.
    pub fn register_in_target(&self, range: Range<u64>) -> Result<(), NotRegistered> {
        self.write_protect(range.start, range.end - range.start).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => NotRegistered::Busy,
            Some(libc::ENOMEM | libc::ESRCH) => NotRegistered::Gone,
            _ => NotRegistered::Unsuitable,
        })
    }

    fn write_protect(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register =
            UffdioRegister { range: UffdioRange { start, len }, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one UffdioRegister; it changes how faults on the range are
        // noted and never its contents.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &mut register) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Ends the tracking of a range that was registered; protection left on its pages is lifted.
    pub fn unregister(&self, start: *mut u8, len: usize) -> Result<(), TrackingError> {
        let mut range = UffdioRange { start: start as u64, len: len as u64 };
        // SAFETY: UFFDIO_UNREGISTER reads one UffdioRange.
        let rc = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_UNREGISTER, &mut range) };
        if rc == 0 {
            return Ok(());
        }
        Err(TrackingError::Io("unregister guest memory from userfaultfd", io::Error::last_os_error()))
    }
}
