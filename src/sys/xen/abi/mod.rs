//! Layouts and numbers of Linux's privcmd and of Xen's hypercalls, x86-64, one file for each interface.
//!
//! Every layout is asserted when it is compiled. They are those of Xen 4.17 to 4.22, between which the structs used here
//! do not differ by a byte; only the number that XEN_DOMCTL_INTERFACE_VERSION has to have does ([`version`]).

pub mod domctl;
pub mod hvm;
pub mod memory;
pub mod privcmd;
pub mod version;

/// A domain's number.
pub type DomId = u16;

/// Hypercall numbers (xen/include/public/xen.h, `__HYPERVISOR_*`).
pub mod hypercall {
    /// memory_op
    pub const MEMORY_OP: u64 = 12;
    /// xen_version
    pub const XEN_VERSION: u64 = 17;
    /// hvm_op
    pub const HVM_OP: u64 = 34;
    /// domctl
    pub const DOMCTL: u64 = 36;
}

/// Plain memory: what may be written into a hypercall buffer and read out of it again as it stands.
///
/// # Safety
/// Every pattern of bits is a value of the type, it has no padding whose contents matter, and its alignment is at most
/// that of a page.
pub unsafe trait Plain: Copy {}

/// Declares structs of the ABI as [`Plain`], with their sizes and the offsets of their fields asserted.
macro_rules! layout {
    ($name:ty, $size:literal, $($field:ident @ $offset:literal),+ $(,)?) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(align_of::<$name>() <= 8);
            $(assert!(memoffset::offset_of!($name, $field) == $offset);)+
        };
        // SAFETY: a repr(C) struct of integers, whose padding is spelt out as fields.
        unsafe impl $crate::sys::xen::abi::Plain for $name {}
    };
}
pub(super) use layout;
