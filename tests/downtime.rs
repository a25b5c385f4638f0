//! The downtime path: from when the guest stands still to when its last page is on the socket, there are a few
//! allocations and page faults for thousands of pages, and not one for each.

#[path = "../benches/stages/counting.rs"]
mod counting;
#[expect(dead_code, reason = "the end-to-end tests use the rest")]
#[path = "end_to_end/harness.rs"]
mod harness;

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pagecast::forecast::{OnNoConvergence, PolicyKind};
use pagecast::guest::arena::client::ArenaGuest;
use pagecast::guest::{DirtyLog, GuestControl, GuestError, HandOver, MovableGuest, PageSource};
use pagecast::page_set::PageSet;
use pagecast::pipeline::control::migrate;
use pagecast::pipeline::live::Observer;
use pagecast::pipeline::outcome::Progress;
use pagecast::pipeline::settings::{Pins, SendMode, Settings, SlotPages};
use pagecast::stream::DomainHeader;
use pagecast::sys::cpu;

/// What the whole process has used.
#[derive(Clone, Copy, Debug)]
struct Used {
    allocations: u64,
    faults: u64,
}

fn used() -> Used {
    Used { allocations: counting::allocations(), faults: cpu::page_faults() }
}

/// A guest that notes what was used by when.
struct Watched {
    guest: ArenaGuest,
    suspended: Option<Used>,
    all_sent: Option<Used>,
}

impl GuestControl for Watched {
    fn nr_pages(&self) -> u64 {
        self.guest.nr_pages()
    }
    fn populated(&mut self) -> Result<PageSet, GuestError> {
        self.guest.populated()
    }
    fn set_log_dirty(&mut self, on: bool) -> Result<(), GuestError> {
        self.guest.set_log_dirty(on)
    }
    fn suspend(&mut self) -> Result<(), GuestError> {
        let done = self.guest.suspend();
        self.suspended = Some(used());
        done
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.guest.resume()
    }
    fn work_done(&mut self) -> Result<Option<(u64, Duration)>, GuestError> {
        self.guest.work_done()
    }
    fn take_dirty_log(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        self.guest.take_dirty_log()
    }
    fn page_source(&mut self) -> Box<dyn PageSource> {
        self.guest.page_source()
    }
}

impl MovableGuest for Watched {
    fn hand_over(&mut self, to: OwnedFd, migration: &str, destination: &str) -> Result<HandOver, GuestError> {
        self.guest.hand_over(to, migration, destination)
    }
    fn context(&mut self, domain: &DomainHeader, digests: bool) -> Vec<u8> {
        self.all_sent = Some(used());
        self.guest.context(domain, digests)
    }
}

struct Silent;

impl Observer for Silent {
    fn progress(&mut self, _: &Progress) {}
}

/// Migrates a guest of 64 MiB of which hardly anything has been sent when it is suspended. Gives the pages that were left, and
/// what was used while they were sent.
fn downtime(send: SendMode) -> (u64, Used) {
    let folder = harness::Folder::new();
    let quiet = ["--memory=64MiB", "--zero-share=0", "--workload=idle"];
    let (_source, guest) = harness::start_guest(&folder.path("here"), &quiet);
    let (_receiver, address) = harness::start_receiver(&folder.path("there"), &["--die-with-parent"]);
    let settings = Settings {
        policy: PolicyKind::Ar,
        downtime_budget: Duration::from_secs(1),
        max_time: Duration::from_millis(1),
        on_no_convergence: OnNoConvergence::Stop,
        linger: 0.0,
        sample_interval: Duration::from_millis(1),
        sample_share: None,
        bandwidth: None,
        send,
        congestion: None,
        lanes: 1,
        pins: Pins::among(&cpu::allowed_cores().unwrap(), 1),
        spin: false,
        slots: 16,
        slot_pages: SlotPages::Auto,
        verify: false,
    };
    let mut watched = Watched { guest, suspended: None, all_sent: None };
    let moved = migrate(&mut watched, &settings, &address, &AtomicBool::new(false), &mut Silent).unwrap();
    let (before, after) = (watched.suspended.unwrap(), watched.all_sent.unwrap());
    let during =
        Used { allocations: after.allocations - before.allocations, faults: after.faults - before.faults };
    (moved.final_pages, during)
}

#[test]
fn the_last_pages_are_sent_without_allocations_and_faults() {
    if !harness::tracking_or_skip("the_last_pages_are_sent_without_allocations_and_faults") {
        return;
    }
    for send in [SendMode::Copy, SendMode::Staged, SendMode::StagedCopy, SendMode::Direct] {
        // Once unwatched, for what is done once in a process.
        downtime(send);
        let (pages, used) = downtime(send);
        println!("{send}: {pages} pages, {used:?}");
        assert!(pages > 8_000, "there is something to send: {pages}");
        // Orders and events are passed in channels.
        assert!(used.allocations < 32 && used.faults < 64, "{send}: {pages} pages, {used:?}");
    }
}
