//! What holds for a domain as a whole, on the simulated one.

mod failures;
mod property;
mod stream;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::simulated::{DOMID, Guest, NEW, OLD, Simulated};
use super::windows::WindowLimits;
use super::*;
use crate::guest::{DirtyLog, PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::xen::tally::Call;

/// A saver as simple as one can be: what a receiver holds, and what is due.
struct Saver {
    domain: XenDomain,
    log: XenDirtyLog,
    pages: XenPages,
    due: PageSet,
    received: BTreeMap<u64, Vec<u8>>,
}

impl Saver {
    fn start(simulated: &Arc<Simulated>, settings: XenSettings) -> Self {
        let domain = XenDomain::open_with(simulated.clone(), DOMID, settings).unwrap();
        domain.set_log_dirty(true).unwrap();
        let (log, pages) = (domain.take_dirty_log().unwrap(), domain.page_source());
        Saver { due: domain.populated().clone(), log, pages, domain, received: BTreeMap::new() }
    }

    fn sample(&mut self) {
        self.log.get_and_clear(&mut self.due).unwrap();
    }

    /// Sends up to `limit` of the pages due.
    fn send(&mut self, limit: usize) {
        let batch: Vec<Pfn> = self.due.iter().take(limit).collect();
        for batch in batch.chunks(512) {
            self.pages.gather(batch);
            for pfn in batch {
                let mut page = [0; PAGE_SIZE];
                match self.pages.copy(*pfn, &mut page) {
                    PageContent::Absent => {}
                    PageContent::Zero => {
                        self.received.insert(pfn.0, vec![0; PAGE_SIZE]);
                    }
                    PageContent::Data => {
                        self.received.insert(pfn.0, page.to_vec());
                    }
                }
                self.due.remove(*pfn);
            }
        }
    }

    /// The stop: what the guest holds has to be what was received.
    fn finish(mut self, simulated: &Simulated) -> XenCosts {
        self.log.get_and_clear_last(&mut self.due).unwrap();
        self.send(usize::MAX);
        self.domain.check().unwrap();
        for (gfn, page) in simulated.guest().image() {
            assert!(self.received.get(&gfn) == Some(&page), "page {gfn:#x} is not what the guest has");
        }
        self.domain.costs()
    }
}

#[test]
fn a_small_guest_is_found_with_a_fraction_of_the_calls_of_a_walk() {
    let simulated = Simulated::pvh(OLD, 4000);
    let domain = XenDomain::open(simulated.clone(), DOMID).unwrap();
    assert!(domain.populated().iter().map(|pfn| pfn.0).eq(simulated.guest().ram()));
    let cost = domain.costs().discovery;
    assert!(cost.proved && !cost.walked_all, "{cost:?}");
    assert_eq!((cost.populated, cost.tot_pages, cost.calls_of_full_walk), (4008, 4008, 1020));
    assert_eq!(cost.calls, simulated.calls().page_types);
    assert!(cost.calls < 12, "{cost:?}");
}

#[test]
fn a_page_in_the_middle_of_nowhere_is_found_because_the_count_falls_short() {
    let simulated = Simulated::pvh(OLD, 100);
    simulated.guest().add(0x50_123);
    let domain = XenDomain::open(simulated.clone(), DOMID).unwrap();
    assert!(domain.populated().contains(Pfn(0x50_123)));
    let cost = domain.costs().discovery;
    assert!(cost.proved && cost.walked_all, "{cost:?}");
}

#[test]
fn what_was_written_while_it_was_saved_arrives_as_it_was_at_the_stop() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 3000);
        let mut saver = Saver::start(&simulated, XenSettings::default());
        for round in 1..6u64 {
            (0..3000).step_by(round as usize * 7).for_each(|gfn| simulated.guest().write(gfn, round));
            saver.sample();
            saver.send(700);
        }
        simulated.guest().write(0xfeffb, 99);
        let costs = saver.finish(&simulated);
        let calls = costs.calls;
        assert_eq!((calls.log_dirty_clean, calls.map_batch, costs.windows.made), (6, 7, 7), "{costs:?}");
        assert_eq!((calls.mmap, calls.munmap, calls.frames_refused), (7, 0, 0));
    }
}

#[test]
fn a_page_replaced_under_a_kept_mapping_is_read_anew_whether_or_not_the_log_shows_it() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 2000);
        simulated.guest().write(700, 1);
        let mut saver = Saver::start(&simulated, XenSettings::default());
        saver.send(usize::MAX);
        saver.sample();
        let mut guest = simulated.guest();
        guest.replace(700);
        guest.write(700, 2);
        drop(guest);
        let costs = saver.finish(&simulated);
        assert_eq!(costs.windows.replaced, u64::from(version == OLD), "{costs:?}");
    }
}

#[test]
fn a_page_replaced_as_the_log_is_cleared_is_not_read_through_its_old_window() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 2000);
        simulated.guest().write(700, 1);
        let mut saver = Saver::start(&simulated, XenSettings::default());
        saver.send(usize::MAX);
        let mut once = true;
        simulated.set_hook(move |guest, call| {
            if call == Call::LogDirtyClean && std::mem::take(&mut once) {
                guest.replace(700);
            }
        });
        saver.sample();
        assert_eq!(saver.due.contains(Pfn(700)), version == NEW);
        saver.send(usize::MAX);
        saver.finish(&simulated);
    }
}

#[test]
fn pages_that_come_and_go_are_sent_if_they_are_there_at_the_stop() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 2000);
        let mut saver = Saver::start(&simulated, XenSettings::default());
        saver.sample();
        saver.send(1000);
        let mut guest = simulated.guest();
        (500..1500).for_each(|gfn| guest.remove(gfn));
        (0x8000..0x8400).for_each(|gfn| {
            guest.add(gfn);
            guest.write(gfn, gfn);
        });
        drop(guest);
        saver.sample();
        saver.send(usize::MAX);
        let mut guest = simulated.guest();
        (500..510).for_each(|gfn| {
            guest.add(gfn);
            guest.write(gfn, 3 * gfn);
        });
        drop(guest);
        let costs = saver.finish(&simulated);
        let last = costs.last_discovery.expect("the guest has ballooned");
        assert!(last.proved && !last.walked_all && last.calls < 20, "{last:?}");
    }
}

#[test]
fn a_page_that_vanishes_between_the_question_and_the_mapping_is_a_hole_until_it_is_back() {
    let simulated = Simulated::pvh(OLD, 600);
    let mut saver = Saver::start(&simulated, XenSettings::default());
    simulated.set_hook(|guest, call| {
        if call == Call::MapBatch {
            guest.remove(5);
        }
    });
    saver.send(usize::MAX);
    assert!(!saver.received.contains_key(&5) && saver.received.len() == 607);
    assert_eq!(saver.domain.costs().windows.vanished, 1);
    simulated.set_hook(|_, _| ());
    simulated.guest().add(5);
    simulated.guest().write(5, 5);
    saver.finish(&simulated);
}

#[test]
fn a_page_that_came_as_a_hole_was_read_is_sent_although_the_count_has_not_changed() {
    let simulated = Simulated::pvh(NEW, 600);
    let mut saver = Saver::start(&simulated, XenSettings::default());
    simulated.guest().add(0x50_123);
    simulated.guest().remove(0xfeff9);
    saver.sample();
    assert!(saver.due.remove(Pfn(0x50_123)), "that it came is in the log");
    // Its chunk was asked for and empty, and is not asked for again.
    assert_eq!(saver.pages.copy(Pfn(0x50_123), &mut [0; PAGE_SIZE]), PageContent::Absent);
    saver.finish(&simulated);
}

#[test]
fn frames_that_a_window_let_go_of_hide_no_page_that_came() {
    let simulated = Simulated::new(OLD, 3 * 512);
    (0..3 * 512).for_each(|gfn| simulated.guest().add(gfn));
    simulated.guest().write(600, 1);
    let windows = WindowLimits { pages: 2 * 512, windows: 2 };
    let mut saver = Saver::start(&simulated, XenSettings { windows, ..XenSettings::default() });
    saver.send(2 * 512);
    saver.sample();
    let counted = simulated.guest().tot_pages();
    simulated.guest().remove(5);
    simulated.guest().replace(600);
    simulated.guest().write(600, 2);
    saver.send(usize::MAX);
    assert_eq!(simulated.guest().tot_pages(), counted, "the first chunk's window has let page 5 go");
    saver.finish(&simulated);
}

#[test]
fn windows_do_not_keep_a_guest_at_its_limit_from_getting_pages_back() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 2000);
        let mut saver = Saver::start(&simulated, XenSettings::default());
        saver.send(usize::MAX);
        let mut guest = simulated.guest();
        (100..200).for_each(|gfn| guest.remove(gfn));
        assert_eq!(guest.tot_pages(), 2008, "the windows hold what was given up");
        (100..110).for_each(|gfn| guest.add(gfn));
        guest.info.max_pages = 2018;
        drop(guest);
        saver.sample();
        assert_eq!(simulated.guest().tot_pages(), 1918);
        saver.finish(&simulated);
    }
}

#[test]
fn only_the_clearing_counts_as_time_that_the_guest_was_held_up() {
    let simulated = Simulated::pvh(OLD, 2000);
    let mut saver = Saver::start(&simulated, XenSettings::default());
    saver.send(usize::MAX);
    simulated.set_hook(|_, call| {
        if call == Call::DomainInfo {
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
    });
    let began = std::time::Instant::now();
    saver.sample();
    let (all, held_up) = (began.elapsed(), saver.log.held_up().unwrap());
    assert!(held_up + std::time::Duration::from_millis(30) <= all, "{held_up:?} of {all:?}");
    saver.finish(&simulated);
}

#[test]
fn a_page_that_became_one_of_xens_own_is_not_sent() {
    let simulated = Simulated::pvh(OLD, 600);
    let mut saver = Saver::start(&simulated, XenSettings::default());
    simulated.guest().add_special(9);
    saver.sample();
    saver.send(usize::MAX);
    assert!(!saver.received.contains_key(&9));
    assert_eq!(saver.pages.copy(Pfn(600), &mut [0; PAGE_SIZE]), PageContent::Absent);
    saver.finish(&simulated);
}

#[test]
fn windows_stay_within_their_limits_and_the_oldest_goes() {
    let simulated = Simulated::pvh(NEW, 512 * 8);
    let windows = WindowLimits { pages: 1100, windows: 100 };
    let mut saver = Saver::start(&simulated, XenSettings { windows, ..XenSettings::default() });
    saver.send(usize::MAX);
    let counts = saver.domain.costs().windows;
    assert_eq!((counts.made, counts.evicted, counts.kept), (9, 6, 3), "{counts:?}");
    assert_eq!((counts.pages, counts.most_pages), (1032, 1032));
    // The last two chunks of RAM are still there, the first is not.
    let made = |saver: &mut Saver, pfn: u64| {
        saver.pages.gather(&[Pfn(pfn)]);
        saver.domain.costs().windows.made
    };
    assert_eq!((made(&mut saver, 4095), made(&mut saver, 3000 + 584), made(&mut saver, 0)), (9, 9, 10));
    let costs = saver.finish(&simulated);
    assert_eq!(costs.calls.mmap - costs.calls.munmap, 3);
}

#[test]
fn windows_are_left_to_the_end_of_the_process_where_that_is_near() {
    for (windows_at_end, unmapped) in [(WindowsAtEnd::Unmapped, 5), (WindowsAtEnd::LeftToExit, 0)] {
        let simulated = Simulated::pvh(NEW, 512 * 4);
        let mut saver = Saver::start(&simulated, XenSettings { windows_at_end, ..XenSettings::default() });
        saver.send(usize::MAX);
        let Saver { pages, domain, .. } = saver;
        drop(pages);
        assert_eq!((domain.costs().calls.mmap, domain.costs().calls.munmap), (5, unmapped));
    }
}

#[test]
fn dirty_logging_left_on_by_another_is_taken_over_and_ends_with_the_domain() {
    let simulated = Simulated::pvh(NEW, 10);
    simulated.enable_log_dirty(DOMID, 10).unwrap();
    let domain = XenDomain::open(simulated.clone(), DOMID).unwrap();
    domain.set_log_dirty(true).unwrap();
    let mut log = domain.take_dirty_log().unwrap();
    assert!(matches!(domain.take_dirty_log(), Err(XenError::LogTaken(DOMID))));
    simulated.guest().write(3, 1);
    let mut dirty = PageSet::empty(domain.nr_pfns());
    log.peek(2..4, &mut dirty).unwrap();
    assert!(dirty.len() == 1 && dirty.contains(Pfn(3)) && log.dirty_count().unwrap() == 1);
    dirty.clear();
    log.peek(4..64, &mut dirty).unwrap();
    log.peek(0..3, &mut dirty).unwrap();
    assert!(dirty.is_empty());
    drop(domain);
    assert!(!simulated.guest().is_logging());
    assert!(log.get_and_clear(&mut dirty).is_err());
}

#[test]
fn what_cannot_be_migrated_is_refused_with_the_reason() {
    let refusal = |change: &dyn Fn(&mut Guest)| {
        let simulated = Simulated::pvh(NEW, 10);
        change(&mut simulated.guest());
        XenDomain::open(simulated, DOMID).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(refusal(&|guest| guest.info.hvm = false).contains("PV guest"));
    assert!(refusal(&|guest| guest.info.dying = true).contains("being destroyed"));
    assert!(refusal(&|guest| guest.nr_pfns = 1 << 31).contains("page-number space"));
    assert!(refusal(&|guest| guest.nr_pfns = u64::MAX).contains("page-number space"));
    assert_eq!(refusal(&|_| ()), "");
    let other = XenDomain::open(Simulated::pvh(NEW, 10), 8).err().unwrap();
    assert!(other.to_string().contains("no domain 8"));
}
