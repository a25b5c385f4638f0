//! memory_op: `xen/include/public/memory.h`.

use super::{DomId, layout};

/// XENMEM_maximum_gpfn: the highest frame number in a guest's p2m. The argument is a [`DomId`].
pub const MAXIMUM_GPFN: u64 = 14;

/// The argument of [`MAXIMUM_GPFN`], a bare `domid_t`, filled up to a word.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MaximumGpfn {
    /// Whose.
    pub domid: DomId,
    /// Not looked at.
    pub pad: [u16; 3],
}

layout!(MaximumGpfn, 8, domid @ 0);
