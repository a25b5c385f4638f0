//! Power over processes whose image is migrated: they are stopped by SIGSTOP, compared, and run on.
//!
//! A process cannot run at the far side: its descriptors, its kernel state and its threads' registers stay here. What moves is
//! its memory, page by page through the whole pipeline, as a guest's would; at the stop it is compared there, and then
//! the process runs on here. It does so on every way out: when a migration fails, when this is dropped, and, by a
//! [`Guardian`], when this process is killed.

use std::collections::HashSet;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::areas::{self, Backing};
use super::diagnosis::Suspects;
use super::history::ZEROES;
use super::image::{Image, ImagePages};
use super::log::ImageLog;
use super::proc::{self, Stat};
use super::tracker::{Choice, Tracker};
use crate::guest::{DirtyLog, GuestControl, GuestError, HandOver, MovableGuest, PageSource};
use crate::page::{CHUNK_PAGES, is_zero};
use crate::stream::arena_context::{ArenaContext, MAX_DIGESTS, page_digest};
use crate::stream::records::DomainHeader;
use crate::sys::TrackingError;
use crate::sys::guardian::Guardian;
use crate::transport::session::{self, Message};

/// How long processes may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// How long the destination may take to say that it cannot run an image.
const FAREWELL: Duration = Duration::from_secs(10);

/// Bytes in a chunk.
const CHUNK_BYTES: u64 = 2 << 20;

/// Room for growth besides a quarter: 64 MiB.
const SPARE_CHUNKS: u64 = 32;

/// Memory that is mapped and not touched counts up to this much, in chunks: 1 GiB.
const MAX_UNTOUCHED_CHUNKS: u64 = 512;

/// A process, or a tree of them, as a source guest.
pub struct ProcessGuest {
    pid: i32,
    choice: Choice,
    image: Arc<Image>,
    tracker: Option<Tracker>,
    guardian: Guardian,
    /// Stopped here, and to be continued.
    stopped: Vec<i32>,
    farewell: Option<String>,
    /// What is known of pages that differ, once the comparison was prepared.
    differences: Option<Vec<String>>,
}

impl ProcessGuest {
    /// Attaches to a process. The image has room for `image_bytes`, or by default for what is there now and some growth.
    pub fn attach(pid: i32, mut choice: Choice, image_bytes: Option<u64>) -> Result<Self, GuestError> {
        let start = |error| TrackingError::Io("start a guardian process", error);
        let guardian = Guardian::start().map_err(start)?;
        choice.max_chunks = super::tracker::MOST_CHUNKS;
        let mut tracker = Tracker::attach(pid, choice)?;
        let chunks = match image_bytes {
            Some(bytes) => bytes.div_ceil(CHUNK_BYTES),
            None => expected_chunks(&mut tracker, &choice)?,
        };
        let max_chunks = chunks.clamp(1, (MAX_DIGESTS / CHUNK_PAGES) as u64) as u32;
        tracker.limit_chunks(max_chunks)?;
        let image = Arc::new(Image::new(u64::from(max_chunks) * CHUNK_PAGES as u64));
        let (stopped, farewell) = (Vec::new(), None);
        let (tracker, differences) = (Some(tracker), None);
        Ok(ProcessGuest { pid, choice, image, tracker, guardian, stopped, farewell, differences })
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What the destination said of running it.
    pub fn farewell(&self) -> Option<&str> {
        self.farewell.as_deref()
    }

    /// Of each page, up to a few, that was last sent otherwise than it was when the processes stood still: where it is mapped and
    /// what has become of it. None before the migration has come to the comparison.
    pub fn differences(&self) -> Option<&[String]> {
        self.differences.as_deref()
    }

    /// Stops those of `pids` that run.
    fn stop(&mut self, pids: &[i32]) -> Result<(), GuestError> {
        for pid in pids {
            let Ok(stat) = Stat::of(*pid) else { continue };
            // One that somebody else has stopped is not to be continued here.
            if stat.has_ended() || stat.state == b'T' || self.stopped.contains(pid) {
                continue;
            }
            let minded = self.guardian.mind(*pid);
            minded.map_err(|error| TrackingError::Io("talk to the guardian process", error))?;
            self.stopped.push(*pid);
            signal(*pid, Signal::STOP);
        }
        let since = Instant::now();
        for pid in pids {
            while !stands_still(*pid) {
                if since.elapsed() > STOP_PATIENCE {
                    return Err(GuestError::Refused(format!(
                        "process {pid} does not stop: a thread of it waits inside the kernel"
                    )));
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        Ok(())
    }
}

/// Chunks that an image is likely to need: what is mapped writable, up to a limit beyond what is populated, and a quarter.
fn expected_chunks(tracker: &mut Tracker, choice: &Choice) -> Result<u64, TrackingError> {
    tracker.survey(&mut |_| {})?;
    let populated = tracker.ids().nr_pages() / CHUNK_PAGES as u64;
    let wanted = areas::Wanted { read_only: false, ..choice.wanted };
    let mut text = String::new();
    let mut objects = HashSet::new();
    let mapped: u64 = tracker
        .pids()
        .flat_map(|pid| areas::list(pid, &wanted, &mut text).unwrap_or_default())
        // However many map it, an object's memory is there once.
        .filter(|area| area.backing == Backing::Private || objects.insert((area.backing, area.length())))
        .map(|area| area.range.end.div_ceil(CHUNK_BYTES) - area.range.start / CHUNK_BYTES)
        .sum();
    let chunks = populated.max(mapped.min(populated + MAX_UNTOUCHED_CHUNKS));
    Ok(chunks + chunks / 4 + SPARE_CHUNKS)
}

fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // One that has ended needs no signal.
        let _ = kill_process(pid, signal);
    }
}

/// Whether every thread of a process is stopped or has ended.
fn stands_still(pid: i32) -> bool {
    proc::threads(pid).into_iter().all(|thread| {
        proc::thread_state(pid, thread).is_none_or(|state| matches!(state, b'T' | b't' | b'Z' | b'X'))
    })
}

impl GuestControl for ProcessGuest {
    fn nr_pages(&self) -> u64 {
        self.image.nr_pages()
    }

    fn set_log_dirty(&mut self, _: bool) -> Result<(), GuestError> {
        // It begins with the attachment and ends with the log itself.
        Ok(())
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        let mut known = self.image.processes();
        if !known.contains(&self.pid) {
            known.push(self.pid);
        }
        loop {
            self.stop(&known)?;
            if !self.choice.children {
                return Ok(());
            }
            // Nobody who is stopped has children any more, but the last ones may not be known yet.
            let more: Vec<i32> = known
                .iter()
                .chain([&self.pid])
                .flat_map(|pid| proc::children(*pid))
                .filter(|child| !known.contains(child))
                .filter(|child| Stat::of(*child).is_ok_and(|stat| !stat.has_ended()))
                .collect();
            if more.is_empty() {
                return Ok(());
            }
            known.extend(more);
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        for pid in self.stopped.drain(..) {
            signal(pid, Signal::CONT);
        }
        self.guardian
            .forget()
            .map_err(|error| TrackingError::Io("talk to the guardian process", error).into())
    }

    fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError> {
        Ok(None)
    }

    fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let taken = || GuestError::Refused("its dirty log is in use already".to_owned());
        let tracker = self.tracker.take().ok_or_else(taken)?;
        Ok(Box::new(ImageLog::new(tracker, self.image.clone())))
    }

    fn page_source(&mut self) -> Box<dyn PageSource> {
        Box::new(ImagePages::new(self.image.clone()))
    }
}

impl MovableGuest for ProcessGuest {
    fn can_move(&self) -> bool {
        false
    }

    fn hand_over(&mut self, connection: OwnedFd, _: &str, _: &str) -> Result<HandOver, GuestError> {
        // Everything is compared by now, and nothing that comes could keep the process from running on.
        self.resume()?;
        let connection = TcpStream::from(connection);
        let asked = connection
            .set_read_timeout(Some(FAREWELL))
            .and_then(|()| session::send(&connection, &Message::Go))
            .and_then(|()| session::receive(&connection));
        let said = match asked {
            Ok(Message::Aborted { reason }) => reason,
            Ok(other) => return Err(GuestError::Protocol(format!("{other:?}"))),
            Err(error) => format!("nothing ({error})"),
        };
        self.farewell = Some(said.clone());
        Ok(HandOver::Mirrored(said))
    }

    fn context(&mut self, domain: &DomainHeader, digests: bool) -> Vec<u8> {
        let nr_pages = self.image.nr_pages();
        if !digests {
            return ArenaContext { nr_pages, digests: None }.encode(domain);
        }
        let mut all = Vec::with_capacity(nr_pages as usize);
        let mut pages = ImagePages::new(self.image.clone());
        let mut suspects = Suspects::default();
        pages.each(&mut |pfn, page, could_be_read| {
            let digest = page_digest(pfn, page);
            let noted = if is_zero(page) { ZEROES } else { digest };
            suspects.look(&self.image, pfn, could_be_read.then_some(noted));
            // What cannot be read cannot be equal.
            all.push(if could_be_read { digest } else { !digest });
        });
        self.differences = Some(suspects.explain(&self.image, &mut pages));
        ArenaContext { nr_pages, digests: Some(all) }.encode(domain)
    }
}

impl Drop for ProcessGuest {
    fn drop(&mut self) {
        let _ = self.resume();
    }
}
