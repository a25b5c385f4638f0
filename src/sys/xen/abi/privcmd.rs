//! Linux's privcmd: `include/uapi/xen/privcmd.h`.

use memoffset::offset_of;

use super::DomId;

/// IOCTL_PRIVCMD_HYPERCALL
pub const HYPERCALL: libc::c_ulong = 0x0030_5000;

/// IOCTL_PRIVCMD_MMAPBATCH_V2
pub const MMAPBATCH_V2: libc::c_ulong = 0x0020_5004;

/// The number that the kernel gives an ioctl of privcmd: no direction, but a size.
const fn number(nr: libc::c_ulong, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (b'P' as libc::c_ulong) << 8 | nr
}

/// `struct privcmd_hypercall`: the ioctl's result is that of the hypercall.
#[repr(C)]
pub struct Hypercall {
    /// Its number.
    pub op: u64,
    /// Its arguments; pointers are addresses of the calling process.
    pub arg: [u64; 5],
}

/// `struct privcmd_mmapbatch_v2`.
#[repr(C)]
pub struct MmapBatchV2 {
    /// Frames.
    pub num: u32,
    /// Whose.
    pub dom: DomId,
    /// Unused.
    pub pad: u16,
    /// Where they are to appear.
    pub addr: u64,
    /// `num` frame numbers, u64 each.
    pub arr: *const u64,
    /// `num` results, int each: 0 or a negative errno.
    pub err: *mut i32,
}

const _: () = {
    assert!(size_of::<Hypercall>() == 48 && number(0, 48) == HYPERCALL);
    assert!(offset_of!(Hypercall, op) == 0);
    assert!(offset_of!(Hypercall, arg) == 8);
    assert!(size_of::<MmapBatchV2>() == 32 && number(4, 32) == MMAPBATCH_V2);
    assert!(offset_of!(MmapBatchV2, num) == 0);
    assert!(offset_of!(MmapBatchV2, dom) == 4);
    assert!(offset_of!(MmapBatchV2, addr) == 8);
    assert!(offset_of!(MmapBatchV2, arr) == 16);
    assert!(offset_of!(MmapBatchV2, err) == 24);
};
