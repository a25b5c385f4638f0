//! An image has, page for page, what its processes have: everything in it that changes is told by the log, whatever the way
//! in which it changes.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::areas::Wanted;
use super::diagnosis::{Suspects, digest};
use super::history::ZEROES;
use super::image::{Image, ImagePages};
use super::log::ImageLog;
use super::tracker::{Choice, MOST_CHUNKS, Tracker};
use crate::guest::{DirtyLog, PageSource};
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::sys::TrackingError;
use crate::sys::ptrace::specimen::Specimen;

const CHOICE: Choice = Choice {
    wanted: Wanted { min_bytes: 1 << 20, shared: true, stack: false, read_only: false },
    children: true,
    max_chunks: MOST_CHUNKS,
};

/// A copy of a specimen's memory that is kept as the far side of a migration keeps it: what is dirty is read and sent.
struct Mirror {
    image: Arc<Image>,
    /// The addresses of the regions of the specimen that count: it has stacks, too, that change when they like.
    regions: Vec<Range<u64>>,
    log: ImageLog,
    pages: ImagePages,
}

impl Mirror {
    /// Of regions by address and pages, with as many `children` attached to. None, with a word, where the machine does not allow
    /// it.
    fn start(specimen: &Specimen, children: usize, regions: &[(u64, u64)], test: &str) -> Option<Self> {
        let tracker = match Tracker::attach(specimen.pid(), CHOICE) {
            Ok(tracker) => tracker,
            Err(error @ (TrackingError::Kernel(_) | TrackingError::Rights(_))) => {
                eprintln!("SKIPPED: {test}: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let image = Arc::new(Image::new(128 * 512));
        let log = ImageLog::new(tracker, image.clone());
        let regions =
            regions.iter().map(|(start, pages)| *start..*start + pages * PAGE_SIZE as u64).collect();
        let mut mirror = Mirror { image: image.clone(), regions, log, pages: ImagePages::new(image) };
        let since = Instant::now();
        loop {
            mirror.follow();
            if mirror.image.processes().len() > children {
                return Some(mirror);
            }
            // On a busy machine the first attempt may come too late.
            assert!(since.elapsed() < Duration::from_secs(30), "{test}: the children are never attached to");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A sample, and what it found dirty is sent. Gives how many pages of the regions that were.
    fn follow(&mut self) -> usize {
        let mut dirty = PageSet::empty(self.image.nr_pages());
        self.log.get_and_clear(&mut dirty).unwrap();
        for pfn in dirty.iter() {
            self.pages.gather(&[pfn]);
            self.pages.copy(pfn, &mut [0; PAGE_SIZE]);
        }
        dirty.iter().filter(|pfn| self.counts(*pfn)).count()
    }

    /// Pages of the regions, and those that were sent and have no place any more.
    fn counts(&self, pfn: Pfn) -> bool {
        match self.image.place(pfn) {
            Some((_, va)) => self.regions.iter().any(|region| region.contains(&va)),
            None => self.image.history().past(pfn).sent != ZEROES,
        }
    }

    /// The first bytes of the pages of the regions that are not all zeroes.
    fn contents(&mut self) -> Vec<u8> {
        let counted: Vec<Pfn> = (0..self.image.nr_pages()).map(Pfn).filter(|pfn| self.counts(*pfn)).collect();
        let first = |pfn| self.pages.read_again(pfn).map(|page| page[0]);
        counted.into_iter().filter_map(first).filter(|byte| *byte != 0).collect()
    }

    /// What would be said of the pages that were last sent otherwise than they are now.
    fn differences(&mut self) -> Vec<String> {
        let mut suspects = Suspects::default();
        let counted: Vec<Pfn> = (0..self.image.nr_pages()).map(Pfn).filter(|pfn| self.counts(*pfn)).collect();
        for pfn in counted {
            let now = self.pages.read_again(pfn).map(|page| digest(pfn, page));
            suspects.look(&self.image, pfn, now);
        }
        suspects.explain(&self.image, &mut self.pages)
    }
}

#[test]
fn an_explanation_names_where_a_page_is_mapped_and_what_has_become_of_it() {
    let test = "an_explanation_names_where_a_page_is_mapped_and_what_has_become_of_it";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    let own = specimen.ask("own 1024")[0];
    specimen.ask("touch 0 5 1 1");
    specimen.ask("touch 1 7 1 20");
    let child = specimen.ask("child 0 6 1 1024 0")[0];
    let Some(mut mirror) = Mirror::start(&specimen, 1, &[(shared, 1024), (own, 1024)], test) else { return };
    assert_eq!(mirror.differences(), [""; 0]);
    specimen.ask("touch 0 5 1 1");
    let said = mirror.differences();
    let surveys = mirror.image.history().surveys();
    let (pid, page) = (specimen.pid(), shared + 5 * PAGE_SIZE as u64);
    assert_eq!(said.len(), 1, "{said:?}");
    for part in [
        "shared memory (/dev/zero, page 0x5 of it)".to_owned(),
        format!("{pid} at {page:#x}"),
        format!("{child} at {page:#x}"),
        format!("first populated in survey 1 of {surveys}, dirty in "),
        "last read to be sent after survey ".to_owned(),
        "what it was sent as is outdated".to_owned(),
    ] {
        assert!(said[0].contains(&part), "{part} is not in {said:?}");
    }
    mirror.follow();
    assert_eq!(mirror.differences(), [""; 0]);
    specimen.ask("touch 1 7 1 20");
    let said = mirror.differences();
    assert_eq!((said.len(), said[8].as_str()), (9, "12 more pages differ"));
    let place = format!("private memory (anonymous) of process {pid} at {:#x}", own + 7 * PAGE_SIZE as u64);
    assert!(said[0].contains(&place), "{place} is not in {said:?}");
    specimen.ask(&format!("end {child}"));
}

#[test]
fn shared_memory_that_is_first_touched_by_a_mere_reader_is_sent_then() {
    let test = "shared_memory_that_is_first_touched_by_a_mere_reader_is_sent_then";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    specimen.ask("touch 0 5 1 1");
    // The memory stays, but for the page tables nobody has touched it.
    specimen.ask("drop 0 5 1");
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(shared, 1024)], test) else { return };
    assert_eq!(specimen.ask("look 0 5 1 1"), [1]);
    mirror.follow();
    assert_eq!(mirror.contents(), [1]);
    assert_eq!(mirror.differences(), [""; 0]);
    // Once.
    specimen.ask("look 0 5 1 1");
    assert_eq!(mirror.follow(), 0);
}

#[test]
fn shared_memory_that_only_an_ended_process_had_touched_is_read_through_another_mapping() {
    let test = "shared_memory_that_only_an_ended_process_had_touched_is_read_through_another_mapping";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 2048")[0];
    let child = specimen.ask("child 0 5 1 2048 0")[0];
    let Some(mut mirror) = Mirror::start(&specimen, 1, &[(shared, 2048)], test) else { return };
    assert_eq!(mirror.contents(), [1]);
    specimen.ask(&format!("end {child}"));
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![1], vec![]));
}

#[test]
fn a_page_is_read_through_a_mapping_that_has_it_where_mappings_differ() {
    let test = "a_page_is_read_through_a_mapping_that_has_it_where_mappings_differ";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 2048")[0];
    specimen.ask("touch 0 400 1 1");
    let child = specimen.ask("child 0 5 1 300 0")[0];
    let Some(mut mirror) = Mirror::start(&specimen, 1, &[(shared, 2048)], test) else { return };
    assert_eq!((mirror.contents(), mirror.differences()), (vec![1, 1], vec![]));
    specimen.ask("release 0 0 300");
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![1, 1], vec![]));
    specimen.ask(&format!("end {child}"));
}

#[test]
fn shared_memory_that_nobody_maps_any_more_reads_as_zeroes_whatever_comes_in_its_place() {
    let test = "shared_memory_that_nobody_maps_any_more_reads_as_zeroes_whatever_comes_in_its_place";
    let mut specimen = Specimen::start(false);
    let (first, second) = (specimen.ask("share 1024")[0], specimen.ask("share 1024")[0]);
    specimen.ask("touch 0 5 1 3");
    specimen.ask("touch 1 6 1 3");
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(first, 1024), (second, 1024)], test) else {
        return;
    };
    specimen.ask("release 0 0 1024");
    specimen.ask("renew 1 0 1024");
    specimen.ask("touch 1 6 1 1");
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![1], vec![]));
}

#[test]
fn shared_memory_that_is_punched_out_is_told() {
    let test = "shared_memory_that_is_punched_out_is_told";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    specimen.ask("touch 0 5 1 2");
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(shared, 1024)], test) else { return };
    mirror.follow();
    specimen.ask("punch 0 5 1");
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![1], vec![]));
}

#[test]
fn what_was_written_next_to_a_mapping_that_was_replaced_is_told() {
    let test = "what_was_written_next_to_a_mapping_that_was_replaced_is_told";
    for kind in ["own", "share"] {
        let mut specimen = Specimen::start(false);
        let region = specimen.ask(&format!("{kind} 2048"))[0];
        specimen.ask("touch 0 0 1 2048");
        let Some(mut mirror) = Mirror::start(&specimen, 0, &[(region, 2048)], test) else { return };
        specimen.ask("touch 0 3 1 5");
        specimen.ask("renew 0 1024 1024");
        specimen.ask("touch 0 1030 1 1");
        mirror.follow();
        assert_eq!((mirror.contents().len(), mirror.differences()), (1025, vec![]), "{kind}");
    }
}

#[test]
fn what_a_child_writes_that_cannot_be_attached_to_is_not_lost() {
    let test = "what_a_child_writes_that_cannot_be_attached_to_is_not_lost";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    specimen.ask("touch 0 5 1 2");
    let child = specimen.ask("child 0 5 1 1024 1")[0];
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(shared, 1024)], test) else { return };
    // While it is tried again, and when that has been given up.
    let mut after = 0;
    while after < 3 {
        specimen.ask(&format!("again {child}"));
        mirror.follow();
        assert_eq!(mirror.differences(), [""; 0]);
        after += mirror.image.toll().not_attached;
        std::thread::sleep(Duration::from_millis(20));
    }
    specimen.ask(&format!("end {child}"));
}

#[test]
fn what_a_grandchild_wrote_that_ended_before_its_parent_was_known_is_not_lost() {
    let test = "what_a_grandchild_wrote_that_ended_before_its_parent_was_known_is_not_lost";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    specimen.ask("touch 0 5 1 1");
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(shared, 1024)], test) else { return };
    let child = specimen.ask("child 0 5 1 1024 2")[0];
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![2], vec![]));
    specimen.ask(&format!("end {child}"));
}

#[test]
fn what_a_child_wrote_that_came_and_went_between_two_samples_is_not_lost() {
    let test = "what_a_child_wrote_that_came_and_went_between_two_samples_is_not_lost";
    let mut specimen = Specimen::start(false);
    let shared = specimen.ask("share 1024")[0];
    specimen.ask("touch 0 5 1 1");
    let Some(mut mirror) = Mirror::start(&specimen, 0, &[(shared, 1024)], test) else { return };
    let child = specimen.ask("child 0 5 1 1024 0")[0];
    specimen.ask(&format!("end {child}"));
    mirror.follow();
    assert_eq!((mirror.contents(), mirror.differences()), (vec![2], vec![]));
}
