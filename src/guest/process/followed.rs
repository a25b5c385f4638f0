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
}

struct Part {
    range: Range<u64>,
    /// Whether the log of it was cleared once.
    armed: bool,
}

impl Process {
    /// A process of which nothing is registered yet; `space` is the number of its address space.
    pub fn new(attachment: Attachment, space: u32) -> Self {
        let last = attachment.stat;
        Process { attachment, last, space, areas: BTreeMap::new() }
    }

    /// Takes note of the areas that there are now, and registers the new ones. True: shared memory is no longer mapped where
    /// it was, and with the mapping went the knowledge of what was written through it last.
    pub fn follow(&mut self, listed: Vec<Area>, toll: &mut Toll) -> bool {
        let mut before = std::mem::take(&mut self.areas);
        for area in listed {
            let start = area.range.start;
            let tracked = match before.remove(&start) {
                Some(tracked) if tracked.area.range == area.range && tracked.area.backing == area.backing => {
                    tracked
                }
                _ => Tracked { parts: register(&self.attachment.uffd, &area, toll), area },
            };
            self.areas.insert(start, tracked);
        }
        before.values().any(|gone| gone.area.backing != Backing::Private)
    }

    /// Tells what its page map says.
    pub fn take(
        &mut self,
        how: How,
        ids: &mut Ids,
        found: &mut dyn FnMut(&Seen),
    ) -> Result<(), TrackingError> {
        let (uffd, pagemap, pid) = (&self.attachment.uffd, &mut self.attachment.pagemap, self.attachment.pid);
        for tracked in self.areas.values_mut() {
            let area = &tracked.area;
            let shared = area.backing != Backing::Private;
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
            let mut scanned = Ok(());
            tracked.parts.retain_mut(|part| {
                let mut result = part.take(area.backing, how, pagemap, &mut number);
                if result.as_ref().is_err_and(is_not_registered) {
                    // Another mapping has come in the place of the one that was registered.
                    part.armed = false;
                    if uffd.register_in_target(part.range.clone()).is_err() {
                        return false;
                    }
                    result = part.take(area.backing, how, pagemap, &mut number);
                }
                match result {
                    Err(error) if is_not_registered(&error) => return false,
                    Err(error) => scanned = Err(error),
                    Ok(()) => {}
                }
                true
            });
            full.map_err(|error: Full| TrackingError::Target(error.to_string()))?;
            match scanned {
                // The process has ended under our hands.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
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
        Ok(())
    }
}

impl Part {
    fn take(
        &mut self,
        backing: Backing,
        how: How,
        pagemap: &mut Pagemap,
        found: &mut dyn FnMut(u64, u64, bool),
    ) -> io::Result<()> {
        let (start, end) = (self.range.start, self.range.end);
        match (backing, self.armed, how) {
            (Backing::Private, _, How::Written) => {
                pagemap.take_written_present(start, end, &mut |from, to| found(from, to, true))?;
            }
            (Backing::Private, _, How::Populated) => pagemap.take_populated(start, end, found)?,
            // With its holes armed too, a page that is only read through this mapping does not count as written.
            (Backing::Shared { .. }, true, _) => {
                pagemap.take_written(start, end, &mut |from, to| found(from, to, true))?;
                if how == How::Populated {
                    pagemap.present(start, end, &mut |from, to| found(from, to, false))?;
                }
            }
            // Armed first, then told: what is written in between is told twice rather than never.
            (Backing::Shared { .. }, false, _) => {
                pagemap.take_written(start, end, &mut |_, _| {})?;
                pagemap.present(start, end, &mut |from, to| found(from, to, true))?;
            }
        }
        self.armed = true;
        Ok(())
    }
}

fn is_not_registered(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// Registers an area as a whole if that goes, or else mapping by mapping. Gives what is registered.
fn register(uffd: &Userfaultfd, area: &Area, toll: &mut Toll) -> Vec<Part> {
    let part = |range: &Range<u64>| Part { range: range.clone(), armed: false };
    if uffd.register_in_target(area.range.clone()).is_ok() {
        return vec![part(&area.range)];
    }
    let mut parts = Vec::new();
    for piece in &area.pieces {
        match uffd.register_in_target(piece.clone()) {
            Ok(()) => parts.push(part(piece)),
            Err(NotRegistered::Gone) => {}
            Err(NotRegistered::Busy | NotRegistered::Unsuitable) => toll.skipped_mappings += 1,
        }
    }
    parts
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
