//! What holds for a domain as a whole, on the simulated one.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use super::simulated::{DOMID, NEW, OLD, Simulated};
use super::windows::WindowLimits;
use super::*;
use crate::guest::{DirtyLog, PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::stream::{self, HEADER_ROOM, Limits, MAX_ENTRIES, PageRecord, Record, StreamReader};
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
        saver.sample();
        saver.send(usize::MAX);
        let mut guest = simulated.guest();
        guest.replace(700);
        guest.write(700, 2);
        drop(guest);
        let costs = saver.finish(&simulated);
        assert_eq!(costs.windows.replaced, u64::from(version == OLD), "{costs:?}");
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
    let refusal = |change: &dyn Fn(&mut simulated::Guest)| {
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

/// A migration with something in each of its parts, up to the first error.
fn migrate(simulated: &Arc<Simulated>) -> Result<(), Box<dyn std::error::Error>> {
    let domain = XenDomain::open(simulated.clone(), DOMID)?;
    let records = domain.static_records()?;
    domain.set_log_dirty(true)?;
    let (mut log, mut pages) = (domain.take_dirty_log()?, domain.page_source());
    let mut due = domain.populated().clone();
    for last in [false, true] {
        simulated.guest().replace(30);
        simulated.guest().add(0x7000 + u64::from(last));
        if last {
            log.get_and_clear_last(&mut due)?;
        } else {
            log.get_and_clear(&mut due)?;
        }
        for pfn in due.iter() {
            pages.copy(pfn, &mut [0; PAGE_SIZE]);
        }
        due.clear();
    }
    domain.check()?;
    assert!(!records.is_empty() && !domain.tail_records()?.is_empty());
    domain.set_log_dirty(false)?;
    Ok(())
}

#[test]
fn a_call_that_fails_anywhere_is_an_error_and_leaves_dirty_logging_off() {
    let counts = |simulated: &Simulated| {
        let calls = simulated.calls();
        [
            (Call::DomainInfo, calls.domain_info),
            (Call::MaximumGpfn, calls.maximum_gpfn),
            (Call::PageTypes, calls.page_types),
            (Call::LogDirtyClean, calls.log_dirty_clean),
            (Call::LogDirtyOff, calls.log_dirty_off),
            (Call::CpuPolicy, calls.cpu_policy),
            (Call::TscInfo, calls.tsc_info),
            (Call::HvmContext, calls.hvm_context),
            (Call::HvmParam, calls.hvm_param),
            (Call::MapBatch, calls.map_batch),
        ]
    };
    let simulated = Simulated::pvh(OLD, 60);
    migrate(&simulated).unwrap();
    assert!(!simulated.guest().is_logging());
    for (call, times) in counts(&simulated) {
        assert!(times > 0, "{call:?} is not part of the test");
        for successes in 0..times as u32 {
            let simulated = Simulated::pvh(OLD, 60);
            simulated.guest().fail(call, successes, libc::ENOMEM);
            assert!(migrate(&simulated).is_err(), "{call:?} failing after {successes} passes unnoticed");
            assert!(!simulated.guest().is_logging(), "{call:?} failing after {successes} leaves it on");
        }
    }
}

#[test]
fn logging_that_cannot_be_had_is_off_and_the_reason_is_told() {
    for (errno, reason) in [(libc::EINVAL, "PCI device"), (libc::EOPNOTSUPP, "shadow paging")] {
        let simulated = Simulated::pvh(OLD, 60);
        let domain = XenDomain::open(simulated.clone(), DOMID).unwrap();
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        domain.set_log_dirty(true).unwrap();
        domain.set_log_dirty(false).unwrap();
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        simulated.guest().fail(Call::LogDirtyEnable, 0, errno);
        let error = domain.set_log_dirty(true).err().unwrap().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(!simulated.guest().is_logging());
    }
}

/// Writes the pages that are due, none of them zero, as records.
fn write_pages(saver: &mut Saver, out: &mut impl std::io::Write) {
    let mut slot = vec![0; HEADER_ROOM + MAX_ENTRIES * PAGE_SIZE];
    let due: Vec<Pfn> = saver.due.iter().collect();
    for batch in due.chunks(MAX_ENTRIES) {
        saver.pages.gather(batch);
        let mut record = PageRecord::new(&mut slot);
        for pfn in batch {
            // A zero page goes out in full: XALLOC does not promise zeroes.
            if saver.pages.copy(*pfn, record.next_page()) != PageContent::Absent {
                record.commit(*pfn);
            }
            saver.due.remove(*pfn);
        }
        if !record.is_empty() {
            let range = record.finish();
            out.write_all(&slot[range]).unwrap();
        }
    }
}

#[test]
fn a_whole_save_through_a_pipe_reads_back_as_the_guest() {
    let simulated = Simulated::pvh(OLD, 1500);
    (0..1500).filter(|gfn| gfn % 3 != 0).for_each(|gfn| simulated.guest().write(gfn, gfn + 1));
    let (input, mut output) = std::io::pipe().unwrap();
    let playing = simulated.clone();
    let writer = std::thread::spawn(move || {
        let mut saver = Saver::start(&playing, XenSettings::default());
        output.write_all(&stream::headers(&saver.domain.header())).unwrap();
        output.write_all(&saver.domain.static_records().unwrap()).unwrap();
        output.write_all(&stream::record(stream::RecordType::STATIC_DATA_END, &[])).unwrap();
        write_pages(&mut saver, &mut output);
        (100..200).for_each(|gfn| playing.guest().write(gfn, 5));
        assert!(!saver.domain.is_suspended().unwrap());
        playing.guest().info.shutdown_reason = Some(2);
        assert!(saver.domain.is_suspended().unwrap());
        saver.log.get_and_clear_last(&mut saver.due).unwrap();
        write_pages(&mut saver, &mut output);
        saver.domain.check().unwrap();
        output.write_all(&saver.domain.tail_records().unwrap()).unwrap();
        output.write_all(&stream::end()).unwrap();
    });
    let mut reader = StreamReader::open(input, Limits::new(0xff000)).unwrap();
    assert_eq!((reader.domain().xen_major, reader.domain().xen_minor), (4, 17));
    let mut received = BTreeMap::new();
    let mut others = Vec::new();
    loop {
        match reader.next_record().unwrap() {
            Record::End => break,
            Record::PageData => {
                let entries: Vec<Pfn> = reader.entries().iter().map(|entry| entry.pfn).collect();
                let mut bytes = vec![0; entries.len() * PAGE_SIZE];
                let mut rest = &mut bytes[..];
                reader
                    .read_pages(&mut |_, pages| {
                        let (run, behind) = std::mem::take(&mut rest).split_at_mut(pages * PAGE_SIZE);
                        rest = behind;
                        run
                    })
                    .unwrap();
                for (pfn, page) in entries.iter().zip(bytes.chunks(PAGE_SIZE)) {
                    received.insert(pfn.0, page.to_vec());
                }
            }
            other => others.push(other),
        }
    }
    writer.join().unwrap();
    assert!(received == simulated.guest().image(), "the image differs");
    let expected = [
        Record::CpuidPolicy((0..48).collect()),
        Record::MsrPolicy((0..32).collect()),
        Record::StaticDataEnd,
        Record::TscInfo(simulated.tsc_info(DOMID).unwrap()),
        Record::HvmContext((0..=250).collect()),
        Record::HvmParams(vec![(1, 0xfeffc), (17, 0xfefff), (12, 0xfeffb)]),
    ];
    assert_eq!(others, expected);
}
