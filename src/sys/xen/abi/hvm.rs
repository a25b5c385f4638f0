//! hvm_op: `xen/include/public/hvm/hvm_op.h` and `params.h`.

use super::{DomId, layout};

/// HVMOP_get_param
pub const GET_PARAM: u64 = 1;

/// HVM_NR_PARAMS: indices are below this.
pub const NR_PARAMS: u32 = 39;

/// `struct xen_hvm_param`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HvmParam {
    /// Whose.
    pub domid: DomId,
    /// Zero.
    pub pad: u16,
    /// Which.
    pub index: u32,
    /// Out.
    pub value: u64,
}

layout!(HvmParam, 16, domid @ 0, pad @ 2, index @ 4, value @ 8);

/// The parameters that belong into a stream, in the order in which Xen's own saver sends them
/// (tools/libs/guest/xg_sr_save_x86_hvm.c); each only if it is not 0.
pub const SAVED_PARAMS: [u32; 16] = [
    1,  // STORE_PFN
    5,  // IOREQ_PFN
    6,  // BUFIOREQ_PFN
    27, // PAGING_RING_PFN
    28, // MONITOR_RING_PFN
    29, // SHARING_RING_PFN
    37, // VM86_TSS_SIZED
    17, // CONSOLE_PFN
    19, // ACPI_IOPORTS_LOCATION
    9,  // VIRIDIAN
    12, // IDENT_PT
    34, // VM_GENERATION_ID_ADDR
    32, // IOREQ_SERVER_PFN
    33, // NR_IOREQ_SERVER_PAGES
    36, // X87_FIP_WIDTH
    38, // MCA_CAP
];
