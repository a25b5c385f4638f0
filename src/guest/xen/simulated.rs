//! A domain that exists in this process only, behind the same seam as a real one, for tests.
//!
//! Its memory is a memfd, so that what is mapped shows later writes, and frames are counted as Xen counts them: one that
//! the guest has given up stays as it is, and stays among the guest's, for as long as it is mapped. With a version that does
//! not log changes of the p2m, a page that the guest gets is not logged until the next CLEAN.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::MemfdFlags;

use super::XenError;
use super::hypervisor::{DomainInfo, Hypervisor};
use crate::page::PAGE_SIZE;
use crate::stream::TscInfo;
use crate::sys::xen::CallError;
use crate::sys::xen::abi::DomId;
use crate::sys::xen::abi::domctl::{MAX_FRAMES, page_type};
use crate::sys::xen::abi::version::XenVersion;
use crate::sys::xen::foreign::ForeignMapping;
use crate::sys::xen::interface::CpuPolicy;
use crate::sys::xen::tally::{Call, Tally};

/// The number of the only domain.
pub(crate) const DOMID: DomId = 7;

/// Frames that there may ever be: the memfd is sparse.
const MAX_MEMORY_FRAMES: u64 = 1 << 20;

/// A release whose dirty log misses changes of the p2m, and one whose log shows them.
pub(crate) const OLD: XenVersion = XenVersion { major: 4, minor: 17, point: Some(7) };
pub(crate) const NEW: XenVersion = XenVersion { major: 4, minor: 22, point: Some(0) };

struct Frame {
    /// By the p2m and by mappings.
    references: u32,
    /// One of Xen's own.
    special: bool,
}

/// What happens in the middle of a call, before Xen does it.
type Hook = Box<dyn FnMut(&mut Guest, Call) + Send>;

/// The guest, for a test to play.
pub(crate) struct Guest {
    memory: OwnedFd,
    p2m: BTreeMap<u64, u64>,
    frames: Vec<Frame>,
    pub(crate) nr_pfns: u64,
    pub(crate) info: DomainInfo,
    pub(crate) params: BTreeMap<u32, u64>,
    logs_p2m_changes: bool,
    logging: bool,
    dirty: Vec<u64>,
    /// Pages that the guest has got so far.
    pub(crate) came: u64,
    /// Pages whose writes are not logged until the next CLEAN.
    unarmed: BTreeSet<u64>,
    /// The next calls of a kind to fail: how many succeed first, and the error number.
    failures: Vec<(Call, u32, i32)>,
}

impl Guest {
    /// Gives the guest a page of zeroes.
    pub(crate) fn add(&mut self, gfn: u64) {
        self.add_frame(gfn, false);
    }

    /// Puts one of Xen's own pages there, in the place of the guest's if there is one.
    pub(crate) fn add_special(&mut self, gfn: u64) {
        self.remove(gfn);
        self.add_frame(gfn, true);
    }

    fn add_frame(&mut self, gfn: u64, special: bool) {
        assert!(gfn < self.nr_pfns && !self.p2m.contains_key(&gfn));
        self.frames.push(Frame { references: 1, special });
        assert!(self.frames.len() as u64 <= MAX_MEMORY_FRAMES);
        self.p2m.insert(gfn, self.frames.len() as u64 - 1);
        self.came += 1;
        if self.logging && self.logs_p2m_changes {
            self.mark(gfn);
        } else if self.logging {
            self.unarmed.insert(gfn);
        }
    }

    /// Has the guest give a page up; none there is none to give up.
    pub(crate) fn remove(&mut self, gfn: u64) {
        if let Some(frame) = self.p2m.remove(&gfn) {
            self.frames[frame as usize].references -= 1;
            self.unarmed.remove(&gfn);
            if self.logs_p2m_changes {
                self.dirty[gfn as usize / 64] &= !(1 << (gfn % 64));
            }
        }
    }

    /// Has the guest give a page up and get another at the same place.
    pub(crate) fn replace(&mut self, gfn: u64) {
        self.remove(gfn);
        self.add(gfn);
    }

    /// Has the guest write a word of a page, if there is one.
    pub(crate) fn write(&mut self, gfn: u64, word: u64) {
        if let Some(frame) = self.p2m.get(&gfn) {
            let at = frame * PAGE_SIZE as u64 + gfn % 512 * 8;
            rustix::io::pwrite(&self.memory, &word.to_le_bytes(), at).unwrap();
            if self.logging && !self.unarmed.contains(&gfn) {
                self.mark(gfn);
            }
        }
    }

    fn mark(&mut self, gfn: u64) {
        self.dirty[gfn as usize / 64] |= 1 << (gfn % 64);
    }

    /// What the guest's RAM holds.
    pub(crate) fn image(&self) -> BTreeMap<u64, Vec<u8>> {
        self.p2m.keys().filter_map(|gfn| Some((*gfn, self.image_of(*gfn)?))).collect()
    }

    /// What a page of the guest's RAM holds.
    pub(crate) fn image_of(&self, gfn: u64) -> Option<Vec<u8>> {
        let frame = *self.p2m.get(&gfn)?;
        let mut page = vec![0; PAGE_SIZE];
        rustix::io::pread(&self.memory, &mut page, frame * PAGE_SIZE as u64).unwrap();
        (!self.frames[frame as usize].special).then_some(page)
    }

    /// Whether there is anything at a page number.
    pub(crate) fn has(&self, gfn: u64) -> bool {
        self.p2m.contains_key(&gfn)
    }

    /// Page numbers that hold RAM.
    pub(crate) fn ram(&self) -> Vec<u64> {
        let is_ram = |frame: &u64| !self.frames[*frame as usize].special;
        self.p2m.iter().filter(|(_, frame)| is_ram(frame)).map(|(gfn, _)| *gfn).collect()
    }

    pub(crate) fn is_logging(&self) -> bool {
        self.logging
    }

    /// Has a call fail with an error number after `successes` more of its kind.
    pub(crate) fn fail(&mut self, call: Call, successes: u32, errno: i32) {
        self.failures.push((call, successes, errno));
    }

    /// Frames that Xen counts for the guest.
    pub(crate) fn tot_pages(&self) -> u64 {
        self.frames.iter().filter(|frame| frame.references > 0 && !frame.special).count() as u64
    }

    fn failure(&mut self, call: Call) -> Option<i32> {
        let index = self.failures.iter().position(|(kind, _, _)| *kind == call)?;
        let (_, successes, errno) = &mut self.failures[index];
        if *successes > 0 {
            *successes -= 1;
            return None;
        }
        let errno = *errno;
        self.failures.remove(index);
        Some(errno)
    }
}

/// A hypervisor with one domain.
pub(crate) struct Simulated {
    guest: Arc<Mutex<Guest>>,
    hook: Mutex<Option<Hook>>,
    version: XenVersion,
    tally: Arc<Tally>,
}

impl Simulated {
    /// A PVH guest without any pages yet.
    pub(crate) fn new(version: XenVersion, nr_pfns: u64) -> Arc<Self> {
        let memory = rustix::fs::memfd_create("simulated-guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, MAX_MEMORY_FRAMES * PAGE_SIZE as u64).unwrap();
        let info =
            DomainInfo { hvm: true, dying: false, shutdown_reason: None, tot_pages: 0, max_pages: u64::MAX };
        let guest = Guest {
            memory,
            p2m: BTreeMap::new(),
            frames: Vec::new(),
            nr_pfns,
            info,
            params: BTreeMap::from([(1, 0xfeffc), (12, 0xfeffb), (17, 0xfefff), (38, 0)]),
            logs_p2m_changes: version.logs_p2m_changes(),
            logging: false,
            dirty: vec![0; (nr_pfns as usize).div_ceil(64)],
            came: 0,
            unarmed: BTreeSet::new(),
            failures: Vec::new(),
        };
        let guest = Arc::new(Mutex::new(guest));
        Arc::new(Simulated { guest, hook: Mutex::new(None), version, tally: Arc::default() })
    }

    /// A guest like a small PVH one: a million page numbers, RAM at the bottom, a few pages just under 4 GiB, and Xen's
    /// own pages among them.
    pub(crate) fn pvh(version: XenVersion, ram_pages: u64) -> Arc<Self> {
        let simulated = Self::new(version, 0xff000);
        let mut guest = simulated.guest();
        (0..ram_pages).chain(0xfeff8..0xff000).for_each(|gfn| guest.add(gfn));
        guest.add_special(0xfee00);
        guest.add_special(ram_pages);
        drop(guest);
        simulated
    }

    /// The guest, to be played.
    pub(crate) fn guest(&self) -> MutexGuard<'_, Guest> {
        locked(&self.guest)
    }

    /// Has something happen in the middle of every call.
    pub(crate) fn set_hook(&self, hook: impl FnMut(&mut Guest, Call) + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// What comes before each call.
    fn enter(&self, call: Call) -> Result<MutexGuard<'_, Guest>, CallError> {
        self.tally.note(call);
        let mut guest = self.guest();
        if let Some(hook) = &mut *self.hook.lock().unwrap() {
            hook(&mut guest, call);
        }
        match guest.failure(call) {
            Some(errno) => Err(refused(errno)),
            None => Ok(guest),
        }
    }

    fn show(&self, guest: &Guest, nr_pfns: u64, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError> {
        if !guest.logging {
            return Err(refused(libc::EINVAL));
        }
        take(&guest.dirty[..(nr_pfns as usize).div_ceil(64)]);
        Ok(())
    }
}

/// A test that fails with the guest in hand still unmaps.
fn locked(guest: &Mutex<Guest>) -> MutexGuard<'_, Guest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(errno: i32) -> CallError {
    CallError::Call { call: "a simulated call", domid: DOMID, source: io::Error::from_raw_os_error(errno) }
}

impl Hypervisor for Simulated {
    fn version(&self) -> XenVersion {
        self.version
    }

    fn domain_info(&self, domid: DomId) -> Result<DomainInfo, XenError> {
        let guest = self.enter(Call::DomainInfo)?;
        if domid != DOMID {
            return Err(XenError::NoDomain(domid));
        }
        Ok(DomainInfo { tot_pages: guest.tot_pages(), ..guest.info })
    }

    fn maximum_gpfn(&self, _: DomId) -> Result<u64, CallError> {
        Ok(self.enter(Call::MaximumGpfn)?.nr_pfns - 1)
    }

    fn page_types(&self, _: DomId, frames: &mut [u64]) -> Result<(), CallError> {
        let guest = self.enter(Call::PageTypes)?;
        self.tally.add(Call::FramesAsked, frames.len() as u64);
        if frames.len() > MAX_FRAMES {
            return Err(refused(libc::E2BIG));
        }
        for frame in frames {
            let found = guest.p2m.get(frame).map(|number| &guest.frames[*number as usize]);
            *frame = match found {
                Some(found) if !found.special => page_type::NOTAB,
                _ => page_type::XTAB,
            };
        }
        Ok(())
    }

    fn enable_log_dirty(&self, _: DomId, _: u64) -> Result<(), CallError> {
        let mut guest = self.enter(Call::LogDirtyEnable)?;
        if guest.logging {
            return Err(refused(libc::EINVAL));
        }
        guest.logging = true;
        guest.dirty.fill(0);
        guest.unarmed.clear();
        Ok(())
    }

    fn disable_log_dirty(&self, _: DomId) -> Result<(), CallError> {
        self.enter(Call::LogDirtyOff)?.logging = false;
        Ok(())
    }

    fn clean(&self, _: DomId, nr_pfns: u64, _: bool, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError> {
        let mut guest = self.enter(Call::LogDirtyClean)?;
        self.show(&guest, nr_pfns, take)?;
        guest.dirty.fill(0);
        guest.unarmed.clear();
        Ok(())
    }

    fn peek(&self, _: DomId, nr_pfns: u64, take: &mut dyn FnMut(&[u64])) -> Result<(), CallError> {
        let guest = self.enter(Call::LogDirtyPeek)?;
        self.show(&guest, nr_pfns, take)
    }

    fn dirty_count(&self, _: DomId, _: u64) -> Result<u32, CallError> {
        let guest = self.enter(Call::LogDirtyPeek)?;
        Ok(guest.dirty.iter().map(|word| word.count_ones()).sum())
    }

    fn map(&self, _: DomId, gfns: &[u64], errors: &mut [i32]) -> Result<ForeignMapping, CallError> {
        let mut guest = self.enter(Call::MapBatch)?;
        let frames: Vec<Option<u64>> = gfns.iter().map(|gfn| guest.p2m.get(gfn).copied()).collect();
        for (frame, error) in frames.iter().zip(errors) {
            *error = if frame.is_some() { 0 } else { -libc::EINVAL };
        }
        let held: Vec<u64> = frames.iter().flatten().copied().collect();
        for frame in &held {
            guest.frames[*frame as usize].references += 1;
        }
        let owner = self.guest.clone();
        let on_unmap = Box::new(move || {
            let mut guest = locked(&owner);
            for frame in held {
                guest.frames[frame as usize].references -= 1;
            }
        });
        let failed = |source| CallError::Map { domid: DOMID, frames: gfns.len(), source };
        ForeignMapping::of_file(&guest.memory, &frames, &self.tally, on_unmap).map_err(failed)
    }

    fn cpu_policy(&self, _: DomId) -> Result<CpuPolicy, CallError> {
        drop(self.enter(Call::CpuPolicy)?);
        Ok(CpuPolicy { leaves: (0..48).collect(), msrs: (0..32).collect() })
    }

    fn tsc_info(&self, _: DomId) -> Result<TscInfo, CallError> {
        drop(self.enter(Call::TscInfo)?);
        Ok(TscInfo { mode: 2, khz: 2_000_000, nsec: 123_456_789, incarnation: 1 })
    }

    fn hvm_context(&self, _: DomId) -> Result<Vec<u8>, CallError> {
        drop(self.enter(Call::HvmContext)?);
        Ok((0..=250).collect())
    }

    fn hvm_param(&self, _: DomId, index: u32) -> Result<u64, CallError> {
        Ok(self.enter(Call::HvmParam)?.params.get(&index).copied().unwrap_or(0))
    }

    fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }
}
