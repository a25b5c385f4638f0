//! The home of unsafe code and raw kernel interfaces. Elsewhere there is some only in the ring, in the slot pool, and in
//! the sender, which vouches for what it hands to its ring.
//!
//! Everything here is a thin, safe-to-hold wrapper: what a call may do wrong is an error that says what to do.

pub mod console;
pub mod cpu;
pub mod descriptors;
pub mod exec;
pub mod fault_cost;
pub mod guardian;
pub mod guest_memory;
pub mod heir;
pub mod huge_pages;
pub mod memory_info;
pub mod output_file;
pub mod pagemap;
pub mod process_memory;
pub mod ptrace;
pub mod signals;
pub mod simd;
pub mod slot_memory;
pub mod socket;
pub mod uring;
pub mod userfaultfd;
pub mod xen;

use std::io;

/// Why dirty tracking is not to be had: the kernel, the rights, or a failing call.
#[derive(Debug, thiserror::Error)]
pub enum TrackingError {
    /// The running kernel lacks something.
    #[error("the kernel does not allow dirty tracking: {0}")]
    Kernel(String),
    /// The kernel has it, this process may not.
    #[error("the rights do not allow dirty tracking: {0}")]
    Rights(String),
    /// The process to be tracked is of a kind that cannot be.
    #[error("{0}")]
    Target(String),
    /// A call failed for another reason.
    #[error("cannot {0}: {1}")]
    Io(&'static str, #[source] io::Error),
}
