//! Xen as dom0's kernel shows it: privcmd, hypercall buffers, foreign mappings, and the hypercalls of a saver.
//!
//! Nothing of Xen's own libraries is linked: their names change with every release, and what they add to the ioctls is
//! little. What a guest is and when to ask what is the business of `guest::xen`.
//!
//! * [`abi`]: layouts and numbers.
//! * [`privcmd`]: the device: hypercalls, and mapping frames.
//! * [`hypercall_buffer`]: memory that Xen may write to.
//! * [`interface`]: the hypercalls as safe functions.
//! * [`foreign`]: mapped frames of another domain.
//! * [`pinning`]: whether the kernel would send from such frames.
//! * [`tally`]: counts of all calls.

pub mod abi;
pub mod foreign;
pub mod hypercall_buffer;
pub mod interface;
pub mod pinning;
pub mod privcmd;
pub mod tally;

use std::io;

use abi::version::XenVersion;

/// Why Xen cannot be talked to, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no privcmd.
    #[error(
        "cannot open {path}: not found; is this a Xen dom0, and is xen-privcmd loaded? run `pagecast probe`"
    )]
    NotFound {
        /// The device.
        path: String,
    },
    /// It cannot be opened.
    #[error("cannot open {path}: {source}; root in dom0 is needed")]
    Open {
        /// The device.
        path: String,
        /// What the call said.
        source: io::Error,
    },
    /// A buffer cannot be had.
    #[error("cannot get {bytes} bytes of memory for hypercalls: {source}; raise the limit of locked memory")]
    Buffer {
        /// Its size.
        bytes: usize,
        /// What the call said.
        source: io::Error,
    },
    /// A release whose domctl interface is not known.
    #[error(
        "Xen {0} is not one of 4.17 to 4.22, the releases known here; use Xen's own save helper, or name its \
         domctl interface version if you know that it is one of theirs"
    )]
    UnknownRelease(XenVersion),
    /// The release does not have the interface version that it is known to have.
    #[error(
        "Xen {version} refuses domctl interface version {interface:#x}; is its hypervisor a patched one? name the \
         version that it has"
    )]
    Interface {
        /// What it says it is.
        version: XenVersion,
        /// What was tried.
        interface: u32,
    },
    /// A hypercall failed.
    #[error("Xen refused {call} for domain {domid}: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        /// The domain it was about.
        domid: u16,
        /// What it said.
        source: io::Error,
    },
    /// Frames cannot be mapped.
    #[error("cannot map {frames} frames of domain {domid}: {source}")]
    Map {
        /// Whose.
        domid: u16,
        /// How many.
        frames: usize,
        /// What the call said.
        source: io::Error,
    },
    /// A frame stays paged out.
    #[error(
        "frame {gfn:#x} of domain {domid} does not come back from xenpaging; stop xenpaging and try again"
    )]
    PagedOut {
        /// Whose.
        domid: u16,
        /// Which.
        gfn: u64,
    },
}

impl CallError {
    /// The error number of the call that failed, if one did.
    pub fn errno(&self) -> Option<i32> {
        match self {
            CallError::Open { source, .. }
            | CallError::Buffer { source, .. }
            | CallError::Call { source, .. }
            | CallError::Map { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
