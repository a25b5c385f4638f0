//! A process, or a process with all its descendants, followed round by round.
//!
//! Each round the mappings of every process are listed again; new ones are registered, and what was written since the
//! round before is taken from the page maps. Write protection belongs to a *mapping*: a page of shared memory was written
//! if any of the processes wrote it through its own mapping, so all that map it have to be attached to, and it has one
//! number for all of them (by device, inode and offset).
//!
//! A round of a recording tells pages ([`Tracker::round`]), a survey for a migration also what is populated
//! ([`Tracker::survey`]).
//!
//! What a recording tells of a mapping in its first round is everything populated in it. In private memory a page counts again when
//! it is newly populated; in shared memory, where a mere reader populates its own mapping, only when it is written.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::areas::{self, Area, Wanted};
use super::attach::Attachment;
use super::followed::Process;
use super::ids::Ids;
use super::proc::{self, Stat};
use crate::page::{CHUNK_PAGES, Pfn};
use crate::page_set::PageSet;
use crate::sys::TrackingError;

/// Processes followed at a time.
const MAX_PROCESSES: usize = 4096;

/// How often a descendant is tried to be attached to.
const ATTEMPTS: u8 = 5;

/// How long to wait between two attempts at least; as long again after each.
const PAUSE: Duration = Duration::from_millis(100);

/// What to track of whom.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Which mappings.
    pub wanted: Wanted,
    /// Descendants too, those included that appear later.
    pub children: bool,
    /// The most chunks of 2 MiB that there is to be room for.
    pub max_chunks: u32,
}

/// What the tracking has cost and found so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Toll {
    /// Processes attached to, those included that have ended.
    pub attached: u64,
    /// How long threads were stopped for that, together.
    pub stopped: Duration,
    /// How long a thread was stopped at most.
    pub stopped_most: Duration,
    /// Descendants that could not be attached to.
    pub not_attached: u64,
    /// Mappings that could not be tracked.
    pub skipped_mappings: u64,
    /// Those of them that another userfaultfd has hold of.
    pub busy_mappings: u64,
    /// Minor faults of the processes since they were attached to: those for the tracking and their own.
    pub minor_faults: u64,
    /// CPU time of the processes since then.
    pub cpu: Duration,
}

/// What a round found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Processes still there.
    pub alive: usize,
    /// Something may have been written to shared memory since the round before that is not told: a process has ended, or a child
    /// of one that may never have been seen, or one has given up a mapping, or has one that cannot be tracked, or cannot be
    /// attached to.
    pub untold: bool,
}

/// What a survey saw of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saw {
    /// Populated, and written since the survey before.
    Written,
    /// Populated.
    Populated,
    /// Part of a mapping of shared memory: whether populated or not, it can be read there. Told of pages only that are in a
    /// chunk of which something was ever populated.
    Mapped,
}

/// A run of pages that a survey saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The first page's id.
    pub first: Pfn,
    /// How many, within one chunk.
    pub count: u64,
    /// What of it.
    pub what: Saw,
    /// Memory that others may map too.
    pub shared: bool,
    /// Through whose mapping it was seen.
    pub pid: i32,
    /// The first page's address there.
    pub va: u64,
}

/// What a round asks the page maps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// What was written.
    Written,
    /// What is populated, and what of that was written.
    Populated,
}

/// The processes that are followed.
pub struct Tracker {
    root: i32,
    choice: Choice,
    processes: Vec<Process>,
    ids: Ids,
    toll: Toll,
    /// Spaces numbered so far.
    spaces: u32,
    /// Processes that could not be attached to, by number and start.
    refused: HashMap<(i32, u64), Refused>,
    /// Those that have ended and were counted as such, while their parents have not taken note.
    mourned: HashSet<(i32, u64)>,
    text: String,
}

impl Tracker {
    /// Attaches to a process, and to its descendants if so chosen.
    pub fn attach(root: i32, choice: Choice) -> Result<Self, TrackingError> {
        let mut tracker = Tracker {
            root,
            choice,
            processes: Vec::new(),
            ids: Ids::new(choice.max_chunks),
            toll: Toll::default(),
            spaces: 0,
            refused: HashMap::new(),
            mourned: HashSet::new(),
            text: String::new(),
        };
        tracker.add(Attachment::new(root)?);
        tracker.adopt_children();
        Ok(tracker)
    }

    /// Adds to `dirty`, which grows with the id space, the pages written since the round before; in its first round
    /// everything populated.
    pub fn round(&mut self, dirty: &mut PageSet) -> Result<Found, TrackingError> {
        self.take(How::Written, &mut |seen| {
            dirty.grow((seen.first.chunk() as u64 + 1) * CHUNK_PAGES as u64);
            dirty.insert_run(seen.first, seen.count);
        })
    }

    /// Tells all populated pages, and which of them were written since the survey before, and the mappings of shared memory.
    pub fn survey(&mut self, found: &mut dyn FnMut(&Seen)) -> Result<Found, TrackingError> {
        self.take(How::Populated, found)
    }

    /// Looks which pages of a range of one process were written since the survey before. What cannot be told is left out.
    pub fn peek(&mut self, pid: i32, range: Range<u64>, found: &mut dyn FnMut(u64, u64)) {
        if let Some(process) = self.processes.iter_mut().find(|process| process.attachment.pid == pid) {
            let _ = process.attachment.pagemap.peek_written_present(range.start, range.end, found);
        }
    }

    fn take(&mut self, how: How, found: &mut dyn FnMut(&Seen)) -> Result<Found, TrackingError> {
        let mut untold = self.mind_the_living()? | self.adopt_children();
        for process in &mut self.processes {
            let listed = areas::list(process.attachment.pid, &self.choice.wanted, &mut self.text);
            // One that has just ended has no mappings; the next round will see that it is gone.
            let listed = listed.unwrap_or_default();
            untold |= process.follow(listed, &mut self.toll) || process.last.lacks_main_thread();
            untold |= process.take(how, &mut self.ids, found)?;
        }
        Ok(Found { alive: self.processes.len(), untold })
    }

    /// Settles how many chunks there is room for, in all; an error if there are more already.
    pub fn limit_chunks(&mut self, max_chunks: u32) -> Result<(), TrackingError> {
        self.ids.limit(max_chunks).map_err(|full| TrackingError::Target(full.to_string()))
    }

    /// The ids given out so far.
    pub fn ids(&self) -> &Ids {
        &self.ids
    }

    /// What it has cost so far.
    pub fn toll(&self) -> Toll {
        self.processes.iter().fold(self.toll, |toll, process| toll.with(process))
    }

    /// The processes followed now.
    pub fn pids(&self) -> impl Iterator<Item = i32> + '_ {
        self.processes.iter().map(|process| process.attachment.pid)
    }

    fn add(&mut self, attachment: Attachment) {
        self.toll.attached += 1;
        self.toll.stopped += attachment.stopped;
        self.toll.stopped_most = self.toll.stopped_most.max(attachment.stopped);
        self.processes.push(Process::new(attachment, self.spaces));
        self.spaces += 1;
    }

    /// Drops the processes that have ended, and attaches again to those that run another program now. True: one has
    /// ended, or a child of one.
    fn mind_the_living(&mut self) -> Result<bool, TrackingError> {
        let mut ended = false;
        for index in (0..self.processes.len()).rev() {
            let process = &mut self.processes[index];
            let pid = process.attachment.pid;
            let started = process.attachment.stat.start_ticks;
            let now = Stat::of(pid).ok().filter(|stat| stat.start_ticks == started && !stat.has_ended());
            if let Some(now) = now {
                let same_program = now.program == process.attachment.stat.program;
                ended |= now.child_faults != process.last.child_faults;
                process.last = now;
                if same_program {
                    continue;
                }
            }
            ended = true;
            let process = self.processes.swap_remove(index);
            self.toll = self.toll.with(&process);
            drop(process);
            if now.is_some() {
                match Attachment::new(pid) {
                    Ok(attachment) => self.add(attachment),
                    Err(TrackingError::Target(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(ended)
    }

    /// Attaches to descendants that are not attached to yet. Those that cannot be are counted and left alone. True: nothing
    /// tells what one wrote, or may still write, to shared memory: it ended before it could be attached to, or could not be
    /// now. A parent that is stopped takes no note of the end of its children, so that its own count does not tell either.
    fn adopt_children(&mut self) -> bool {
        if !self.choice.children {
            return false;
        }
        let known: HashSet<i32> = self.pids().collect();
        // The process itself may have become another program that could not be attached to at once.
        let mut untold =
            !known.contains(&self.root) && Stat::of(self.root).is_ok() && self.adopt_if_it_lives(self.root);
        let mut seen: HashSet<i32> = known.iter().copied().chain([self.root]).collect();
        let mut ask: Vec<i32> = known.iter().copied().chain([self.root]).collect();
        while let Some(parent) = ask.pop() {
            for child in proc::children(parent) {
                if !seen.insert(child) {
                    continue;
                }
                ask.push(child);
                untold |= self.adopt_if_it_lives(child);
            }
        }
        untold
    }

    fn adopt_if_it_lives(&mut self, pid: i32) -> bool {
        match Stat::of(pid) {
            Ok(stat) if stat.has_ended() => self.mourned.insert((pid, stat.start_ticks)),
            Ok(stat) => self.adopt(pid, &stat),
            Err(_) => true,
        }
    }

    /// Attaches to a process, if it was not tried too often. True as above.
    fn adopt(&mut self, pid: i32, stat: &Stat) -> bool {
        let key = (pid, stat.start_ticks);
        let failed = self.refused.get(&key).copied();
        if failed.is_some_and(|failed| !failed.is_to_be_tried_again())
            || self.processes.len() >= MAX_PROCESSES
        {
            return self.may_write_shared_memory(pid);
        }
        match Attachment::at_once(pid) {
            Ok(attachment) => {
                // Children of its own that have ended by now wrote what nobody saw.
                let had_children = attachment.stat.child_faults > 0;
                self.add(attachment);
                self.refused.remove(&key);
                had_children
            }
            // It may just be ending, or becoming another program: the next rounds will tell.
            Err(_) => {
                let failures = failed.map_or(0, |failed| failed.times) + 1;
                self.refused.insert(key, Refused { times: failures, last: Instant::now() });
                self.toll.not_attached += u64::from(failures == ATTEMPTS);
                true
            }
        }
    }

    /// Whether a process maps shared memory that counts, as far as can be told.
    fn may_write_shared_memory(&mut self, pid: i32) -> bool {
        match areas::list(pid, &self.choice.wanted, &mut self.text) {
            Ok(listed) => listed.iter().any(Area::is_shared),
            Err(_) => true,
        }
    }
}

/// A process that could not be attached to.
#[derive(Clone, Copy)]
struct Refused {
    times: u8,
    last: Instant,
}

impl Refused {
    /// Not at once: one that is becoming another program takes its time.
    fn is_to_be_tried_again(&self) -> bool {
        self.times < ATTEMPTS && self.last.elapsed() >= PAUSE * u32::from(self.times)
    }
}

impl Toll {
    fn with(self, process: &Process) -> Self {
        let (then, now) = (process.attachment.stat, process.last);
        Toll {
            minor_faults: self.minor_faults + now.minor_faults.saturating_sub(then.minor_faults),
            cpu: self.cpu + now.cpu.saturating_sub(then.cpu),
            ..self
        }
    }
}

/// The id space may become as large as a trace can be: 16 TiB.
pub const MOST_CHUNKS: u32 = u32::MAX / CHUNK_PAGES as u32;
