//! One followed process: which of its mappings are registered, and what its page map says of them.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::areas::{Area, Backing};
use super::attach::Attachment;
use super::ids::{Full, Ids, Place, Stretch};
use super::proc::Stat;
use super::tracker::{How, Saw, Seen, Toll};
use crate::page::PAGE_SIZE;
use crate::sys::TrackingError;
use crate::sys::pagemap::{Pagemap, scan_error};
use crate::sys::userfaultfd::{NotRegistered, Userfaultfd};

/// A process that is followed.
pub struct Process {
    /// How it is attached to.
    pub attachment: Attachment,
    /// As it was when last looked at.
    pub last: Stat,
    /// The number of its address space.
    space: u32,
    /// What is registered, by where it begins.
    areas: BTreeMap<u64, Tracked>,
}

/// An area that is registered, but for the mappings that cannot be.
struct Tracked {
    area: Area,
    parts: Vec<Part>,
    /// Whether that is all of it.
    whole: bool,
    /// Whether to register it anew: a part of it was lost.
    stale: bool,
}

struct Part {
    range: Range<u64>,
    log: Log,
}

/// What the log of a part is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// It was never cleared.
    Fresh,
    /// It tells what was written since it was last cleared.
    Kept,
    /// A scan of it broke off in the middle, and what that had cleared was not told.
    Broken,
}

impl Process {
    /// A process of which nothing is registered yet; `space` is the number of its address space.
    pub fn new(attachment: Attachment, space: u32) -> Self {
        let last = attachment.stat;
        Process { attachment, last, space, areas: BTreeMap::new() }
    }

    /// Takes note of the areas that there are now, and registers the new ones. True: shared memory is not mapped as it was, and
    /// with a mapping went the knowledge of what was written through it last.
    pub fn follow(&mut self, listed: Vec<Area>, toll: &mut Toll) -> bool {
        let mut before = std::mem::take(&mut self.areas);
        let mut untold = false;
        for area in listed {
            let start = area.range.start;
            let known = before.remove(&start);
            let tracked = match known {
                Some(tracked) if tracked.area.is_view_of_same(&area) && !tracked.stale => tracked,
                other => {
                    untold |= other.is_some_and(|gone| gone.area.is_shared());
                    register(&self.attachment.uffd, area, toll)
                }
            };
            self.areas.insert(start, tracked);
        }
        untold || before.values().any(|gone| gone.area.is_shared())
    }

    /// Tells what its page map says. True: not all that was written to shared memory.
    pub fn take(
        &mut self,
        how: How,
        ids: &mut Ids,
        found: &mut dyn FnMut(&Seen),
    ) -> Result<bool, TrackingError> {
        let (uffd, pagemap, pid) = (&self.attachment.uffd, &mut self.attachment.pagemap, self.attachment.pid);
        let mut untold = false;
        for tracked in self.areas.values_mut() {
            let area = &tracked.area;
            let shared = area.is_shared();
            untold |= shared && !tracked.whole;
            let mut full = Ok(());
            let mut number = |from: u64, to: u64, written: bool| {
                let stretch = stretch(self.space, area, from, to);
                let what = if written { Saw::Written } else { Saw::Populated };
                let numbered = ids.number(stretch, &mut |first, count, page| {
                    let va = stretch.address(page);
                    found(&Seen { first, count, what, shared, pid, va });
                });
                if numbered.is_err() {
                    full = numbered;
                }
            };
            let mut failed = Ok(());
            tracked.parts.retain_mut(|part| {
                let scanned = part.scan(area.backing, how, uffd, pagemap, &mut number);
                let is_lost = matches!(scanned, Ok(Scanned::Lost));
                tracked.stale |= is_lost;
                untold |= shared && !matches!(scanned, Ok(Scanned::Whole));
                if let Err(error) = scanned {
                    failed = Err(error);
                }
                !is_lost
            });
            full.map_err(|error: Full| TrackingError::Target(error.to_string()))?;
            match failed {
                // The process has ended under our hands.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(untold),
                other => other.map_err(scan_error)?,
            }
            if shared && how == How::Populated {
                let stretch = stretch(self.space, area, area.range.start, area.range.end);
                ids.known(stretch, &mut |first, count, page| {
                    let va = stretch.address(page);
                    found(&Seen { first, count, what: Saw::Mapped, shared, pid, va });
                });
            }
        }
        Ok(untold)
    }
}

/// How the scan of a part went.
enum Scanned {
    /// All of it was as expected.
    Whole,
    /// Another mapping had come in the place of one that was registered. What is populated was told as written.
    Replaced,
    /// It cannot be registered any more.
    Lost,
}

impl Part {
    /// Takes what the page map says, and registers a mapping that has come in the place of another.
    fn scan(
        &mut self,
        backing: Backing,
        how: How,
        uffd: &Userfaultfd,
        pagemap: &mut Pagemap,
        found: &mut dyn FnMut(u64, u64, bool),
    ) -> io::Result<Scanned> {
        match self.take(backing, how, pagemap, found) {
            Err(error) if is_not_registered(&error) => {}
            other => return other.map(|()| Scanned::Whole),
        }
        // The log of the mappings in front of that one, where several touch, is cleared by now, and what it said is lost.
        self.log = Log::Broken;
        if uffd.register_in_target(self.range.clone()).is_err() {
            return Ok(Scanned::Lost);
        }
        match self.take(backing, how, pagemap, found) {
            Err(error) if is_not_registered(&error) => Ok(Scanned::Lost),
            other => other.map(|()| Scanned::Replaced),
        }
    }

    fn take(
        &mut self,
        backing: Backing,
        how: How,
        pagemap: &mut Pagemap,
        found: &mut dyn FnMut(u64, u64, bool),
    ) -> io::Result<()> {
        let (start, end) = (self.range.start, self.range.end);
        match (backing, self.log, how) {
            (Backing::Private, Log::Broken, _) => {
                pagemap.take_populated(start, end, &mut |from, to, _| found(from, to, true))?;
            }
            (Backing::Private, _, How::Written) => {
                pagemap.take_written_present(start, end, &mut |from, to| found(from, to, true))?;
            }
            (Backing::Private, _, How::Populated) => pagemap.take_populated(start, end, found)?,
            // With its holes armed too, a page that is only read through this mapping does not count as written.
            (Backing::Shared { .. }, Log::Kept, _) => {
                pagemap.take_written(start, end, &mut |from, to| found(from, to, true))?;
                if how == How::Populated {
                    pagemap.touched(start, end, &mut |from, to| found(from, to, false))?;
                }
            }
            // Armed first, then told: what is written in between is told twice rather than never.
            (Backing::Shared { .. }, Log::Fresh | Log::Broken, _) => {
                pagemap.take_written(start, end, &mut |_, _| {})?;
                pagemap.touched(start, end, &mut |from, to| found(from, to, true))?;
            }
        }
        self.log = Log::Kept;
        Ok(())
    }
}

fn is_not_registered(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// Registers an area as a whole if that goes, or else mapping by mapping.
fn register(uffd: &Userfaultfd, area: Area, toll: &mut Toll) -> Tracked {
    let part = |range: &Range<u64>| Part { range: range.clone(), log: Log::Fresh };
    if uffd.register_in_target(area.range.clone()).is_ok() {
        return Tracked { parts: vec![part(&area.range)], area, whole: true, stale: false };
    }
    let (mut parts, mut whole) = (Vec::new(), true);
    for piece in &area.pieces {
        match uffd.register_in_target(piece.clone()) {
            Ok(()) => parts.push(part(piece)),
            Err(NotRegistered::Gone) => {}
            Err(refusal) => {
                toll.skipped_mappings += 1;
                toll.busy_mappings += u64::from(matches!(refusal, NotRegistered::Busy));
                whole = false;
            }
        }
    }
    Tracked { area, parts, whole, stale: false }
}

fn stretch(space: u32, area: &Area, from: u64, to: u64) -> Stretch {
    let page = PAGE_SIZE as u64;
    let (from, to) = (from.max(area.range.start), to.min(area.range.end));
    let count = to.saturating_sub(from) / page;
    match area.backing {
        Backing::Private => Stretch { place: Place::Space(space), page: from / page, count, va: from },
        Backing::Shared { object: (device, inode), offset } => Stretch {
            place: Place::Object(device, inode),
            page: (offset + (from - area.range.start)) / page,
            count,
            va: from,
        },
    }
}
