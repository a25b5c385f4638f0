//! The hypercalls that a saver makes, as safe functions: one call each, but for those repeated because a buffer was not
//! there for a moment.
//!
//! Buffers are taken when the interface is opened and used again for every call; only what is asked for once in a
//! migration (policies, contexts) has buffers of its own. Xen does one domctl at a time on the whole host anyway, so one
//! lock around the buffers costs nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::CallError;
use super::abi::domctl::{
    CPUID_LEAF_LEN, DOMCTL_LEN, Domctl, GetCpuPolicy, GetDomainInfo, GetHvmContext, GetTscInfo, Head,
    MAX_FRAMES, MSR_ENTRY_LEN, PageFrameInfo3, Payload, ShadowMode, ShadowOp, shadow,
};
use super::abi::hvm::{GET_PARAM, HvmParam};
use super::abi::memory::{MAXIMUM_GPFN, MaximumGpfn};
use super::abi::version::{EXTRAVERSION_LEN, XENVER_EXTRAVERSION, XENVER_VERSION, XenVersion};
use super::abi::{DomId, Plain, hypercall};
use super::foreign::ForeignMapping;
use super::hypercall_buffer::{DEVICE, HypercallBuffer};
use super::privcmd::Privcmd;
use super::tally::{Call, Tally};

/// The domain number of the caller's own domain.
const DOMID_SELF: DomId = 0x7ff0;

/// How often a call is made again when a buffer was not there, as often as Xen's own library does.
const FAULT_RETRIES: usize = 2;

/// The most bytes of a context or a policy that Xen is believed to have.
const MAX_BLOB: usize = 64 << 20;

/// Buffers that are used again and again.
struct Buffers {
    /// One argument struct, and behind it zeroes, of which Xen reads as many as a whole domctl has.
    frame: HypercallBuffer,
    /// Frame numbers in, types out.
    types: HypercallBuffer,
    /// A dirty bitmap, from when dirty logging is first asked for.
    bitmap: Option<HypercallBuffer>,
}

/// CPU policy of a domain, in the layout of the stream.
pub struct CpuPolicy {
    /// `xen_cpuid_leaf_t`, [`CPUID_LEAF_LEN`] bytes each.
    pub leaves: Vec<u8>,
    /// `xen_msr_entry_t`, [`MSR_ENTRY_LEN`] bytes each.
    pub msrs: Vec<u8>,
}

/// Xen, as this dom0 may ask it.
pub struct Interface {
    privcmd: Privcmd,
    buffer_device: Option<File>,
    buffers: Mutex<Buffers>,
    version: XenVersion,
    domctl_interface: u32,
    tally: Arc<Tally>,
}

impl Interface {
    /// Opens privcmd, asks for Xen's version and takes the domctl interface that goes with it, or `domctl_interface`.
    /// Whether Xen accepts that shows at the first domctl.
    pub fn open(domctl_interface: Option<u32>) -> Result<Self, CallError> {
        let privcmd = Privcmd::open()?;
        let buffer_device = OpenOptions::new().read(true).write(true).open(DEVICE).ok();
        let buffer = |bytes| HypercallBuffer::new(buffer_device.as_ref(), bytes);
        let mut buffers =
            Buffers { frame: buffer(DOMCTL_LEN)?, types: buffer(MAX_FRAMES * 8)?, bitmap: None };
        let tally = Arc::<Tally>::default();
        let version = ask_version(&privcmd, &mut buffers.frame, &tally)?;
        let known = domctl_interface.or(version.domctl_interface());
        let domctl_interface = known.ok_or(CallError::UnknownRelease(version))?;
        let buffers = Mutex::new(buffers);
        Ok(Interface { privcmd, buffer_device, buffers, version, domctl_interface, tally })
    }

    /// The running Xen's version.
    pub fn version(&self) -> XenVersion {
        self.version
    }

    /// The domctl interface version in use.
    pub fn domctl_interface(&self) -> u32 {
        self.domctl_interface
    }

    /// Whether buffers come from /dev/xen/hypercall.
    pub fn has_buffer_device(&self) -> bool {
        self.buffer_device.is_some()
    }

    /// What was called so far.
    pub fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// About the first domain with a number at or above `domid`; None if there is none.
    pub fn domain_info(&self, domid: DomId) -> Result<Option<GetDomainInfo>, CallError> {
        let outcome = self.domctl(
            &mut self.buffers().frame,
            domid,
            Call::DomainInfo,
            FAULT_RETRIES,
            GetDomainInfo::default(),
        );
        match outcome {
            Err(CallError::Call { source, .. }) if source.raw_os_error() == Some(libc::EACCES) => {
                Err(CallError::Interface { version: self.version, interface: self.domctl_interface })
            }
            Err(CallError::Call { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            other => other.map(Some),
        }
    }

    /// The highest frame number in a domain's p2m.
    pub fn maximum_gpfn(&self, domid: DomId) -> Result<u64, CallError> {
        let frame = &mut self.buffers().frame;
        frame.put(MaximumGpfn { domid, pad: [0; 3] });
        let arguments = [MAXIMUM_GPFN, frame.address(), 0, 0, 0];
        let gpfn = self.call(
            frame,
            hypercall::MEMORY_OP,
            arguments,
            (domid, "XENMEM_maximum_gpfn"),
            Call::MaximumGpfn,
            FAULT_RETRIES,
        )?;
        Ok(gpfn as u64)
    }

    /// Replaces frame numbers by page types (`abi::domctl::page_type`). Panics if there are more than [`MAX_FRAMES`].
    pub fn page_types(&self, domid: DomId, frames: &mut [u64]) -> Result<(), CallError> {
        let count = frames.len();
        assert!(count <= MAX_FRAMES, "{count} frames in one call");
        let mut buffers = self.buffers();
        let Buffers { frame, types, .. } = &mut *buffers;
        self.tally.add(Call::FramesAsked, count as u64);
        let mut tries = 0;
        loop {
            // Anew for each try: one that failed half-way has replaced some already.
            types.words_mut()[..count].copy_from_slice(frames);
            let payload = PageFrameInfo3 { num: count as u64, array: types.address() };
            match self.domctl(frame, domid, Call::PageTypes, 0, payload) {
                Err(error) if self.may_retry(frame, &error, tries) => tries += 1,
                Err(error) => return Err(error),
                Ok(_) => break,
            }
        }
        frames.copy_from_slice(&types.words()[..count]);
        Ok(())
    }

    /// Turns dirty logging on, and takes a bitmap for `nr_pfns` pages.
    pub fn enable_log_dirty(&self, domid: DomId, nr_pfns: u64) -> Result<(), CallError> {
        let mut buffers = self.buffers();
        let bytes = (nr_pfns as usize).div_ceil(64) * 8;
        if buffers.bitmap.as_ref().is_none_or(|bitmap| bitmap.len() < bytes) {
            buffers.bitmap = None;
            buffers.bitmap = Some(HypercallBuffer::new(self.buffer_device.as_ref(), bytes)?);
        }
        let payload = ShadowOp { op: shadow::ENABLE_LOGDIRTY, ..ShadowOp::default() };
        self.domctl(&mut buffers.frame, domid, Call::LogDirtyEnable, FAULT_RETRIES, payload).map(drop)
    }

    /// Turns dirty logging off.
    pub fn disable_log_dirty(&self, domid: DomId) -> Result<(), CallError> {
        let payload = ShadowOp { op: shadow::OFF, ..ShadowOp::default() };
        self.domctl(&mut self.buffers().frame, domid, Call::LogDirtyOff, FAULT_RETRIES, payload).map(drop)
    }

    /// Calls `take` with the dirty bitmap of the first `nr_pfns` pages, which Xen clears. `last`: the guest stands still
    /// for good. An EFAULT is not tried again, because Xen has cleared then what it had copied so far.
    pub fn clean(
        &self,
        domid: DomId,
        nr_pfns: u64,
        last: bool,
        take: &mut dyn FnMut(&[u64]),
    ) -> Result<(), CallError> {
        let mode = if last { ShadowMode::FINAL } else { ShadowMode::empty() };
        let request = ShadowOp { op: shadow::CLEAN, mode: mode.bits(), ..ShadowOp::default() };
        self.take_bitmap(domid, nr_pfns, request, Call::LogDirtyClean, 0, take)
    }

    /// Calls `take` with the dirty bitmap of the first `nr_pfns` pages, which stays as it is.
    pub fn peek(&self, domid: DomId, nr_pfns: u64, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError> {
        let request = ShadowOp { op: shadow::PEEK, ..ShadowOp::default() };
        self.take_bitmap(domid, nr_pfns, request, Call::LogDirtyPeek, FAULT_RETRIES, take)
    }

    /// How many pages are dirty since the last CLEAN; no bitmap is copied.
    pub fn dirty_count(&self, domid: DomId, nr_pfns: u64) -> Result<u32, CallError> {
        let payload = ShadowOp { op: shadow::PEEK, pages: nr_pfns, ..ShadowOp::default() };
        let frame = &mut self.buffers().frame;
        Ok(self.domctl(frame, domid, Call::LogDirtyPeek, FAULT_RETRIES, payload)?.dirty_count)
    }

    fn take_bitmap(
        &self,
        domid: DomId,
        nr_pfns: u64,
        request: ShadowOp,
        call: Call,
        retries: usize,
        take: &mut dyn FnMut(&[u64]),
    ) -> Result<(), CallError> {
        let mut buffers = self.buffers();
        let Buffers { frame, bitmap, .. } = &mut *buffers;
        let words = (nr_pfns as usize).div_ceil(64);
        let failed =
            |text: String| CallError::Call { call: ShadowOp::NAME, domid, source: io::Error::other(text) };
        let bitmap = bitmap
            .as_mut()
            .filter(|bitmap| bitmap.words().len() >= words)
            .ok_or_else(|| failed("dirty logging was not turned on for so many pages".to_owned()))?;
        let payload = ShadowOp { dirty_bitmap: bitmap.address(), pages: nr_pfns, ..request };
        let covered = self.domctl(frame, domid, call, retries, payload)?.pages;
        if covered != nr_pfns {
            return Err(failed(format!("its dirty log covers {covered:#x} of {nr_pfns:#x} pages")));
        }
        take(&bitmap.words()[..words]);
        Ok(())
    }

    /// The CPU policy of a domain.
    pub fn cpu_policy(&self, domid: DomId) -> Result<CpuPolicy, CallError> {
        let mut buffers = self.buffers();
        let ask = |frame: &mut HypercallBuffer, payload| {
            self.domctl(frame, domid, Call::CpuPolicy, FAULT_RETRIES, payload)
        };
        let most = ask(&mut buffers.frame, GetCpuPolicy::default())?;
        let size = |count: u32, len: usize| {
            let bytes = count as usize * len;
            if bytes <= MAX_BLOB { Ok(bytes) } else { Err(too_large::<GetCpuPolicy>(domid, bytes)) }
        };
        let leaves = self.buffer(size(most.nr_leaves, CPUID_LEAF_LEN)?)?;
        let msrs = self.buffer(size(most.nr_msrs, MSR_ENTRY_LEN)?)?;
        let payload = GetCpuPolicy { leaves: leaves.address(), msrs: msrs.address(), ..most };
        let got = ask(&mut buffers.frame, payload)?;
        Ok(CpuPolicy {
            leaves: leaves.bytes(got.nr_leaves.min(most.nr_leaves) as usize * CPUID_LEAF_LEN).to_vec(),
            msrs: msrs.bytes(got.nr_msrs.min(most.nr_msrs) as usize * MSR_ENTRY_LEN).to_vec(),
        })
    }

    /// The state of a domain's time stamp counter.
    pub fn tsc_info(&self, domid: DomId) -> Result<GetTscInfo, CallError> {
        let frame = &mut self.buffers().frame;
        self.domctl(frame, domid, Call::TscInfo, FAULT_RETRIES, GetTscInfo::default())
    }

    /// The state of a domain's vCPUs and platform.
    pub fn hvm_context(&self, domid: DomId) -> Result<Vec<u8>, CallError> {
        let mut buffers = self.buffers();
        let ask = |frame: &mut HypercallBuffer, payload| {
            self.domctl(frame, domid, Call::HvmContext, FAULT_RETRIES, payload)
        };
        let size = ask(&mut buffers.frame, GetHvmContext::default())?.size;
        if size as usize > MAX_BLOB {
            return Err(too_large::<GetHvmContext>(domid, size as usize));
        }
        let context = self.buffer(size as usize)?;
        let payload = GetHvmContext { size, pad: 0, buffer: context.address() };
        let got = ask(&mut buffers.frame, payload)?.size;
        Ok(context.bytes(got.min(size) as usize).to_vec())
    }

    /// The value of an HVM parameter.
    pub fn hvm_param(&self, domid: DomId, index: u32) -> Result<u64, CallError> {
        let frame = &mut self.buffers().frame;
        frame.put(HvmParam { domid, pad: 0, index, value: 0 });
        let arguments = [GET_PARAM, frame.address(), 0, 0, 0];
        self.call(
            frame,
            hypercall::HVM_OP,
            arguments,
            (domid, "HVMOP_get_param"),
            Call::HvmParam,
            FAULT_RETRIES,
        )?;
        Ok(frame.get::<HvmParam>().value)
    }

    /// Maps frames of a domain: see [`ForeignMapping::map`].
    pub fn map(&self, domid: DomId, gfns: &[u64], errors: &mut [i32]) -> Result<ForeignMapping, CallError> {
        ForeignMapping::map(&self.privcmd, domid, gfns, errors, &self.tally)
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        // A panic with the buffers in hand leaves nothing in them that the next call relies on.
        self.buffers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn buffer(&self, bytes: usize) -> Result<HypercallBuffer, CallError> {
        HypercallBuffer::new(self.buffer_device.as_ref(), bytes)
    }

    /// Makes a domctl and gives its payload back as Xen has left it. Addresses in the payload have to be those of hypercall
    /// buffers that are in hand, with the sizes that the payload states: this is why it is private.
    fn domctl<P: Payload>(
        &self,
        frame: &mut HypercallBuffer,
        domid: DomId,
        call: Call,
        retries: usize,
        payload: P,
    ) -> Result<P, CallError> {
        let interface_version = self.domctl_interface;
        let head = Head { cmd: P::CMD, interface_version, domain: domid, pad: [0; 3] };
        frame.words_mut()[..DOMCTL_LEN / 8].fill(0);
        frame.put(Domctl { head, payload });
        let arguments = [frame.address(), 0, 0, 0, 0];
        self.call(frame, hypercall::DOMCTL, arguments, (domid, P::NAME), call, retries)?;
        Ok(frame.get::<Domctl<P>>().payload)
    }

    /// Makes a hypercall whose argument struct is in `frame`.
    fn call(
        &self,
        frame: &mut HypercallBuffer,
        op: u64,
        arguments: [u64; 5],
        (domid, name): (DomId, &'static str),
        call: Call,
        retries: usize,
    ) -> Result<i64, CallError> {
        let mut tries = 0;
        loop {
            self.tally.note(call);
            // SAFETY: the struct is in `frame`, of which a whole page is there, and is borrowed mutably; buffers that it points
            // to are held by the callers, all in this file, with the sizes stated.
            match unsafe { self.privcmd.hypercall(op, arguments) } {
                Ok(result) => return Ok(result),
                Err(source) => {
                    let error = CallError::Call { call: name, domid, source };
                    if tries >= retries || !self.may_retry(frame, &error, tries) {
                        return Err(error);
                    }
                    tries += 1;
                }
            }
        }
    }

    /// Whether a call failed only because a buffer was not there for a moment.
    fn may_retry(&self, frame: &HypercallBuffer, error: &CallError, tries: usize) -> bool {
        frame.may_fault() && tries < FAULT_RETRIES && error.errno() == Some(libc::EFAULT)
    }
}

fn too_large<P: Payload>(domid: DomId, bytes: usize) -> CallError {
    let source = io::Error::other(format!("it says {bytes} bytes, which is more than is believed"));
    CallError::Call { call: P::NAME, domid, source }
}

/// An extraversion as the hypercall writes it.
#[repr(C)]
#[derive(Clone, Copy)]
struct ExtraVersion([u8; EXTRAVERSION_LEN]);

const _: () = assert!(size_of::<ExtraVersion>() == 16);

// SAFETY: bytes.
unsafe impl Plain for ExtraVersion {}

fn ask_version(
    privcmd: &Privcmd,
    frame: &mut HypercallBuffer,
    tally: &Tally,
) -> Result<XenVersion, CallError> {
    let failed = |source| CallError::Call { call: "xen_version", domid: DOMID_SELF, source };
    tally.note(Call::XenVersion);
    // SAFETY: XENVER_version takes no argument but its number.
    let packed = unsafe { privcmd.hypercall(hypercall::XEN_VERSION, [XENVER_VERSION, 0, 0, 0, 0]) };
    let packed = packed.map_err(failed)?;
    let arguments = [XENVER_EXTRAVERSION, frame.address(), 0, 0, 0];
    tally.note(Call::XenVersion);
    // SAFETY: Xen writes 16 bytes to the buffer, which has a page and is borrowed mutably.
    let extra = unsafe { privcmd.hypercall(hypercall::XEN_VERSION, arguments) };
    // Without an extraversion the point release is not known, and everything is done as for the first one.
    let extra = extra.map_or([0; EXTRAVERSION_LEN], |_| frame.get::<ExtraVersion>().0);
    Ok(XenVersion::new(packed as u32, &extra))
}
