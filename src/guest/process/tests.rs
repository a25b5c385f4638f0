use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::areas::Wanted;
use super::image::{Image, ImagePages};
use super::log::ImageLog;
use super::tracker::{Choice, MOST_CHUNKS, Tracker};
use crate::guest::{DirtyLog, PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn, is_zero};
use crate::page_set::PageSet;
use crate::sys::TrackingError;
use crate::sys::ptrace::specimen::Specimen;

const CHOICE: Choice = Choice {
    wanted: Wanted { min_bytes: 4 << 20, shared: false, stack: false, read_only: false },
    children: false,
    max_chunks: MOST_CHUNKS,
};

/// Attaches; None, with a word, where the machine does not allow it.
fn attach_or_skip(pid: i32, test: &str) -> Option<Tracker> {
    match Tracker::attach(pid, CHOICE) {
        Ok(tracker) => Some(tracker),
        Err(error @ (TrackingError::Kernel(_) | TrackingError::Rights(_))) => {
            eprintln!("SKIPPED: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The pages of a round that lie in a memory of the specimen's, counted from its first whole page.
fn round(tracker: &mut Tracker, base: u64, pages: u64) -> BTreeSet<u64> {
    let mut dirty = PageSet::empty(0);
    tracker.round(&mut dirty).unwrap();
    let first = base.div_ceil(PAGE_SIZE as u64);
    let va_chunks = tracker.ids().va_chunks();
    dirty
        .iter()
        .map(|pfn| va_chunks[pfn.chunk()] * 512 + pfn.in_chunk() as u64)
        .filter(|page| (first..first + pages).contains(page))
        .map(|page| page - first)
        .collect()
}

#[test]
fn exactly_the_pages_that_were_written_are_told() {
    let test = "exactly_the_pages_that_were_written_are_told";
    let mut specimen = Specimen::start(false);
    let pages = 4096;
    let base = specimen.ask(&format!("map {}", pages + 1))[0];
    specimen.ask("write 0 0 3 100");
    let Some(mut tracker) = attach_or_skip(specimen.pid(), test) else { return };
    let step3: BTreeSet<u64> = (0..100).map(|number| number * 3).collect();
    assert_eq!(round(&mut tracker, base, pages), step3, "round 0: what is populated");
    assert_eq!(round(&mut tracker, base, pages), BTreeSet::new());
    for (first, step, count) in [(1, 7, 500), (0, 1, 4096), (4095, 1, 1), (10, 2, 64)] {
        specimen.ask(&format!("write 0 {first} {step} {count}"));
        let written: BTreeSet<u64> = (0..count).map(|number| first + number * step).collect();
        assert_eq!(round(&mut tracker, base, pages), written);
        assert_eq!(round(&mut tracker, base, pages), BTreeSet::new());
    }
}

#[test]
fn new_mappings_are_followed_and_vanished_ones_do_no_harm() {
    let test = "new_mappings_are_followed_and_vanished_ones_do_no_harm";
    let mut specimen = Specimen::start(false);
    let Some(mut tracker) = attach_or_skip(specimen.pid(), test) else { return };
    round(&mut tracker, 0, 0);
    for number in 0..5 {
        // So large that malloc always maps it afresh.
        let base = specimen.ask("map 10000")[0];
        specimen.ask(&format!("write 0 {number} 5 20"));
        let written: BTreeSet<u64> = (0..20).map(|page| number + page * 5).collect();
        assert_eq!(round(&mut tracker, base, 9999), written);
        specimen.ask("write 0 7 1 1");
        assert_eq!(round(&mut tracker, base, 9999), BTreeSet::from([7]));
        // What comes next may lie in the same place.
        specimen.ask("unmap 0");
    }
    assert_eq!(tracker.toll().skipped_mappings, 0);
}

/// Attaches as soon as nobody else has hold of the memory: a tracer that another test has just forked still has copies of
/// this process's descriptors for a moment.
fn attach_when_free(pid: i32, base: u64, test: &str) -> Tracker {
    let since = std::time::Instant::now();
    loop {
        let mut tracker = attach_or_skip(pid, test).expect("it worked just now");
        if round(&mut tracker, base, 2048).len() == 10 {
            return tracker;
        }
        assert!(since.elapsed().as_secs() < 30, "the memory is never free again");
    }
}

#[test]
fn a_second_tracker_finds_the_mappings_taken_and_a_later_one_does_not() {
    let test = "a_second_tracker_finds_the_mappings_taken_and_a_later_one_does_not";
    let mut specimen = Specimen::start(false);
    let base = specimen.ask("map 2049")[0];
    specimen.ask("write 0 0 1 10");
    let Some(mut first) = attach_or_skip(specimen.pid(), test) else { return };
    assert_eq!(round(&mut first, base, 2048).len(), 10);
    let mut second = attach_or_skip(specimen.pid(), test).expect("it worked just now");
    assert_eq!(round(&mut second, base, 2048).len(), 0);
    assert!(second.toll().skipped_mappings > 0);
    drop(first);
    for _ in 0..20 {
        let mut later = attach_when_free(specimen.pid(), base, test);
        specimen.ask("write 0 5 1 1");
        assert_eq!(round(&mut later, base, 2048), BTreeSet::from([5]));
        assert_eq!(later.toll().skipped_mappings, 0);
    }
}

#[test]
fn an_image_reads_what_the_process_has_and_zeroes_where_it_has_nothing_any_more() {
    let test = "an_image_reads_what_the_process_has_and_zeroes_where_it_has_nothing_any_more";
    let mut specimen = Specimen::start(false);
    let base = specimen.ask("map 10000")[0].div_ceil(PAGE_SIZE as u64) * PAGE_SIZE as u64;
    specimen.ask("write 0 0 7 300");
    specimen.ask("write 0 0 14 150");
    let Some(tracker) = attach_or_skip(specimen.pid(), test) else { return };
    let image = Arc::new(Image::new(64 * 512));
    let mut log = ImageLog::new(tracker, image.clone());
    let page_of = |image: &Image, pfn: Pfn| {
        let (_, va) = image.place(pfn)?;
        let page = va.checked_sub(base)? / PAGE_SIZE as u64;
        (page < 9999).then_some(page)
    };
    let contents = |image: &Arc<Image>| {
        let mut found = BTreeMap::new();
        ImagePages::new(image.clone()).each(&mut |pfn, bytes, could_be_read| {
            assert!(could_be_read);
            if let Some(page) = page_of(image, pfn).filter(|_| !is_zero(bytes)) {
                found.insert(page, bytes[0]);
            }
        });
        found
    };
    let mut dirty = PageSet::empty(image.nr_pages());
    log.get_and_clear(&mut dirty).unwrap();
    let mut expected: BTreeMap<u64, u8> = (0..300).map(|number| (7 * number, 1)).collect();
    expected.extend((0..150).map(|number| (14 * number, 2)));
    assert_eq!(contents(&image), expected);

    // Written: told, and read anew. Read in batches and page by page alike.
    specimen.ask("write 0 21 1 3");
    dirty.clear();
    log.get_and_clear(&mut dirty).unwrap();
    let told: BTreeSet<u64> = dirty.iter().filter_map(|pfn| page_of(&image, pfn)).collect();
    assert_eq!(told, BTreeSet::from([21, 22, 23]));
    expected.extend([(21, 2), (22, 1), (23, 1)]);
    let mut pages = ImagePages::new(image.clone());
    let asked: Vec<Pfn> = dirty.iter().collect();
    pages.gather(&asked);
    for pfn in asked {
        let mut bytes = [0; PAGE_SIZE];
        let content = pages.copy(pfn, &mut bytes);
        if let Some(page) = page_of(&image, pfn) {
            assert_eq!((content, bytes[0]), (PageContent::Data, expected[&page]));
        }
    }
    assert_eq!(contents(&image), expected);

    // Given back: told, and zeroes.
    let places: BTreeMap<Pfn, u64> =
        (0..image.nr_pages()).filter_map(|pfn| Some((Pfn(pfn), page_of(&image, Pfn(pfn))?))).collect();
    specimen.ask("unmap 0");
    dirty.clear();
    log.get_and_clear(&mut dirty).unwrap();
    let told: BTreeSet<u64> = dirty.iter().filter_map(|pfn| places.get(&pfn).copied()).collect();
    assert_eq!(told, expected.keys().copied().collect());
    assert_eq!(contents(&image), BTreeMap::new());
}

#[test]
fn a_target_that_ends_is_seen_to_have_ended() {
    let test = "a_target_that_ends_is_seen_to_have_ended";
    let specimen = Specimen::start(false);
    let Some(mut tracker) = attach_or_skip(specimen.pid(), test) else { return };
    let mut dirty = PageSet::empty(0);
    assert_eq!(tracker.round(&mut dirty).unwrap().alive, 1);
    let pid = specimen.pid();
    drop(specimen);
    assert_eq!(tracker.round(&mut dirty).unwrap().alive, 0);
    assert!(Tracker::attach(pid, CHOICE).is_err());
}

#[test]
fn children_are_attached_to_when_they_appear() {
    use std::process::{Command, Stdio};
    let test = "children_are_attached_to_when_they_appear";
    // A shell that starts a child when it is told to, and then becomes another program.
    let mut shell = Command::new("/bin/sh")
        .args(["-c", "read go; sleep 100 & read go; exec sleep 100"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("/bin/sh");
    let pid = shell.id() as i32;
    let mut input = shell.stdin.take().expect("piped");
    let choice = Choice { children: true, wanted: Wanted { min_bytes: 0, ..CHOICE.wanted }, ..CHOICE };
    let attached = Tracker::attach(pid, choice);
    let mut go = || std::io::Write::write_all(&mut input, b"\n").expect("the shell reads");
    let mut dirty = PageSet::empty(0);
    if let Some(mut tracker) = attach_or_skip(pid, test).and(attached.ok()) {
        let mut until = |what: &str, wanted: &dyn Fn(&Tracker) -> bool| {
            let since = std::time::Instant::now();
            loop {
                dirty.clear();
                tracker.round(&mut dirty).unwrap();
                if wanted(&tracker) {
                    return tracker.pids().collect::<Vec<i32>>();
                }
                assert!(since.elapsed().as_secs() < 30, "{what}");
            }
        };
        until("the shell", &|tracker| tracker.pids().count() == 1);
        go();
        let both = until("its child", &|tracker| tracker.pids().count() == 2);
        go();
        until("another program", &|tracker| tracker.toll().attached >= 3 && tracker.pids().count() == 2);
        for child in both.into_iter().filter(|child| *child != pid) {
            let child = rustix::process::Pid::from_raw(child).expect("a process");
            let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
        }
    }
    let _ = shell.kill();
    let _ = shell.wait();
}
