//! domctl: `xen/include/public/domctl.h`, the sub-commands that a saver uses.

use bitflags::bitflags;

use super::{DomId, Plain, layout};

/// Bytes of `struct xen_domctl`: Xen reads and writes all of it, however short the payload.
pub const DOMCTL_LEN: usize = 144;

/// The most frames of one [`PageFrameInfo3`]; more are refused with E2BIG.
pub const MAX_FRAMES: usize = 1024;

/// What stands in front of a sub-command's payload.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Head {
    /// The sub-command.
    pub cmd: u32,
    /// XEN_DOMCTL_INTERFACE_VERSION
    pub interface_version: u32,
    /// Whose.
    pub domain: DomId,
    /// Zero.
    pub pad: [u16; 3],
}

layout!(Head, 16, cmd @ 0, interface_version @ 4, domain @ 8, pad @ 10);

/// The payload of a sub-command.
pub trait Payload: Plain {
    /// The sub-command's number.
    const CMD: u32;
    /// Its name, for messages.
    const NAME: &'static str;
}

/// A whole domctl, as far as its payload goes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Domctl<P: Payload> {
    /// What and whose.
    pub head: Head,
    /// In and out.
    pub payload: P,
}

// SAFETY: both parts are plain, and no padding is between them: every payload is aligned to at most 8 bytes.
unsafe impl<P: Payload> Plain for Domctl<P> {}

macro_rules! payload {
    ($name:ident, $cmd:literal, $text:literal) => {
        impl Payload for $name {
            const CMD: u32 = $cmd;
            const NAME: &'static str = $text;
        }
        const _: () = assert!(size_of::<Domctl<$name>>() <= DOMCTL_LEN);
    };
}

bitflags! {
    /// `XEN_DOMINF_*`
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DomainFlags: u32 {
        /// It is being torn down.
        const DYING = 1 << 0;
        /// HVM or PVH.
        const HVM_GUEST = 1 << 1;
        /// It has shut down; the reason is in bits 16 to 23.
        const SHUTDOWN = 1 << 2;
        /// Paused by the toolstack.
        const PAUSED = 1 << 3;
        /// All of its vCPUs wait.
        const BLOCKED = 1 << 4;
        /// One of its vCPUs runs.
        const RUNNING = 1 << 5;
        /// Its memory is translated by the hardware.
        const HAP = 1 << 8;
    }
}

/// SHUTDOWN_suspend, a shutdown reason.
pub const SHUTDOWN_SUSPEND: u8 = 2;

/// `struct xen_domctl_getdomaininfo`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GetDomainInfo {
    /// Out: the first domain with a number at or above the one asked for, so it has to be compared.
    pub domain: DomId,
    /// Zero.
    pub pad1: u16,
    /// [`DomainFlags`], and a shutdown reason.
    pub flags: u32,
    /// Frames that belong to it and are counted.
    pub tot_pages: u64,
    /// The most it may have.
    pub max_pages: u64,
    /// Claimed.
    pub outstanding_pages: u64,
    /// Shared with others.
    pub shr_pages: u64,
    /// Paged out.
    pub paged_pages: u64,
    /// Its shared info page.
    pub shared_info_frame: u64,
    /// Nanoseconds.
    pub cpu_time: u64,
    /// vCPUs that are up.
    pub nr_online_vcpus: u32,
    /// The highest vCPU number.
    pub max_vcpu_id: u32,
    /// Security label.
    pub ssidref: u32,
    /// UUID.
    pub handle: [u8; 16],
    /// CPU pool.
    pub cpupool: u32,
    /// Bits of a guest-physical address, where it is told.
    pub gpaddr_bits: u8,
    /// Zero.
    pub pad2: [u8; 7],
    /// `struct xen_arch_domainconfig`: emulation flags and misc flags.
    pub arch_config: [u32; 2],
}

layout!(
    GetDomainInfo, 112,
    domain @ 0, flags @ 4, tot_pages @ 8, max_pages @ 16, outstanding_pages @ 24, shr_pages @ 32, paged_pages @ 40,
    shared_info_frame @ 48, cpu_time @ 56, nr_online_vcpus @ 64, max_vcpu_id @ 68, ssidref @ 72, handle @ 76,
    cpupool @ 92, gpaddr_bits @ 96, arch_config @ 104,
);
payload!(GetDomainInfo, 5, "getdomaininfo");

/// Operations of [`ShadowOp`] (`XEN_DOMCTL_SHADOW_OP_*`).
pub mod shadow {
    /// Ends dirty logging.
    pub const OFF: u32 = 0;
    /// Begins dirty logging.
    pub const ENABLE_LOGDIRTY: u32 = 2;
    /// Copies the bitmap and clears it.
    pub const CLEAN: u32 = 11;
    /// Copies the bitmap.
    pub const PEEK: u32 = 12;
}

bitflags! {
    /// `XEN_DOMCTL_SHADOW_LOGDIRTY_*`
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ShadowMode: u32 {
        /// The guest stands still for good: what Xen itself has mapped of it counts as dirty.
        const FINAL = 1 << 0;
    }
}

/// `struct xen_domctl_shadow_op`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ShadowOp {
    /// One of [`shadow`].
    pub op: u32,
    /// [`ShadowMode`], for CLEAN and PEEK.
    pub mode: u32,
    /// Unused here.
    pub mb: u32,
    /// Zero.
    pub pad: u32,
    /// Address of the bitmap; null asks for the counts alone.
    pub dirty_bitmap: u64,
    /// In: pages that the bitmap has room for; out: pages that it covers.
    pub pages: u64,
    /// Out: write faults taken since the last CLEAN (shadow mode only).
    pub fault_count: u32,
    /// Out: pages dirty since the last CLEAN; stays at its highest value.
    pub dirty_count: u32,
}

layout!(
    ShadowOp, 40,
    op @ 0, mode @ 4, mb @ 8, dirty_bitmap @ 16, pages @ 24, fault_count @ 32, dirty_count @ 36,
);
payload!(ShadowOp, 10, "shadow_op");

/// `struct xen_domctl_hvmcontext`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GetHvmContext {
    /// In: bytes of the buffer; out: bytes of the context.
    pub size: u32,
    /// Zero.
    pub pad: u32,
    /// Address of the buffer; null asks for the size.
    pub buffer: u64,
}

layout!(GetHvmContext, 16, size @ 0, buffer @ 8);
payload!(GetHvmContext, 33, "gethvmcontext");

/// `struct xen_domctl_tsc_info`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GetTscInfo {
    /// XEN_CPUID_TSC_MODE
    pub tsc_mode: u32,
    /// kHz that the guest sees.
    pub gtsc_khz: u32,
    /// How often it was migrated.
    pub incarnation: u32,
    /// Zero.
    pub pad: u32,
    /// Nanoseconds.
    pub elapsed_nsec: u64,
}

layout!(GetTscInfo, 24, tsc_mode @ 0, gtsc_khz @ 4, incarnation @ 8, elapsed_nsec @ 16);
payload!(GetTscInfo, 59, "gettscinfo");

/// `struct xen_domctl_getpageframeinfo3`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct PageFrameInfo3 {
    /// At most [`MAX_FRAMES`].
    pub num: u64,
    /// Address of as many u64: frame numbers in, [page types](page_type) out.
    pub array: u64,
}

layout!(PageFrameInfo3, 16, num @ 0, array @ 8);
payload!(PageFrameInfo3, 61, "getpageframeinfo3");

/// What [`PageFrameInfo3`] answers about a frame (`XEN_DOMCTL_PFINFO_*`).
pub mod page_type {
    /// The bits of the answer that are the type.
    pub const MASK: u64 = 0xf << 28;
    /// An ordinary page.
    pub const NOTAB: u64 = 0;
    /// The page's memory has failed.
    pub const BROKEN: u64 = 0xd << 28;
    /// No page, or one of Xen's own that is no RAM (and can be mapped all the same).
    pub const XTAB: u64 = 0xf << 28;
}

/// `struct xen_domctl_cpu_policy`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GetCpuPolicy {
    /// In: leaves that there is room for; out: leaves.
    pub nr_leaves: u32,
    /// The same of MSRs.
    pub nr_msrs: u32,
    /// Address of the leaves, [`CPUID_LEAF_LEN`] bytes each; null with `msrs` null asks for the greatest numbers.
    pub leaves: u64,
    /// Address of the MSRs, [`MSR_ENTRY_LEN`] bytes each.
    pub msrs: u64,
    /// Out, for the setter.
    pub err_leaf: u32,
    /// Out, for the setter.
    pub err_subleaf: u32,
    /// Out, for the setter.
    pub err_msr: u32,
    /// Zero.
    pub pad: u32,
}

layout!(
    GetCpuPolicy, 40,
    nr_leaves @ 0, nr_msrs @ 4, leaves @ 8, msrs @ 16, err_leaf @ 24, err_subleaf @ 28, err_msr @ 32,
);
payload!(GetCpuPolicy, 82, "get_cpu_policy");

/// Bytes of `xen_cpuid_leaf_t`.
pub const CPUID_LEAF_LEN: usize = 24;

/// Bytes of `xen_msr_entry_t`.
pub const MSR_ENTRY_LEN: usize = 16;
