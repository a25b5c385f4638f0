//! A whole save, as a receiver sees it.

use std::collections::BTreeMap;
use std::io::Write;

use super::Saver;
use crate::guest::xen::simulated::{DOMID, OLD, Simulated};
use crate::guest::xen::{Hypervisor, XenSettings};
use crate::guest::{DirtyLog, PageContent, PageSource};
use crate::page::{PAGE_SIZE, Pfn};
use crate::stream::{self, HEADER_ROOM, Limits, MAX_ENTRIES, PageRecord, Record, StreamReader};

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
                for (entry, page) in reader.read_copies() {
                    received.insert(entry.pfn.0, page.expect("each page has data"));
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
