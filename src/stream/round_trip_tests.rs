//! What the writer writes, the reader reads.

use super::sample::{Choppy, DOMAIN, NR_PAGES, places, small_stream};
use super::*;
use crate::page::{PAGE_SIZE, Pfn};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Size of the page-number space of the random streams.
const NR_PFNS: u64 = 700;

/// A batch of pages: what each is, a fill byte where it has data.
type Batch = BTreeMap<u64, Result<u8, PageKind>>;

fn batch() -> impl Strategy<Value = Batch> {
    let page = prop_oneof![
        6 => any::<u8>().prop_map(Ok),
        1 => Just(Err(PageKind::Alloc)),
        1 => Just(Err(PageKind::Xtab)),
        1 => Just(Err(PageKind::Broken)),
    ];
    // Runs, so that several pages share a buffer.
    proptest::collection::vec((0..NR_PFNS, proptest::collection::vec(page, 1..12)), 1..12).prop_map(|runs| {
        let pages = runs.into_iter().flat_map(|(first, pages)| (first..NR_PFNS).zip(pages));
        pages.collect()
    })
}

/// Writes a batch, as several records if the slot is too small, and notes what was written.
fn write_batch(
    batch: &Batch,
    slot_pages: usize,
    external: bool,
    stream: &mut Vec<u8>,
    records: &mut Vec<Vec<PageEntry>>,
) {
    let mut todo = batch.iter().peekable();
    while todo.peek().is_some() {
        let mut slot = vec![0xee; HEADER_ROOM + slot_pages * PAGE_SIZE];
        let mut pages = PageRecord::new(&mut slot);
        let mut elsewhere = Vec::new();
        let mut entries = Vec::new();
        while let Some((pfn, page)) = todo.next_if(|(_, page)| match page {
            Ok(_) if !external => pages.has_room(),
            _ => !pages.is_full(),
        }) {
            let pfn = Pfn(*pfn);
            match page {
                Ok(fill) if external => {
                    pages.push_external(pfn);
                    elsewhere.extend_from_slice(&[*fill; PAGE_SIZE]);
                }
                Ok(fill) => {
                    pages.next_page().fill(*fill);
                    pages.commit(pfn);
                }
                Err(kind) => pages.push_empty(pfn, *kind),
            }
            entries.push(PageEntry { pfn, kind: page.err().unwrap_or(PageKind::NoTab) });
        }
        assert_eq!(pages.entries(), entries.len());
        let range = pages.finish();
        stream.extend_from_slice(&slot[range]);
        stream.extend_from_slice(&elsewhere);
        records.push(entries);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_written_is_read_back_however_it_arrives(
        batches in proptest::collection::vec((batch(), 1usize..40, any::<bool>()), 0..5),
        tsc in any::<(u32, u32, u64, u32)>(),
        params: Vec<(u64, u64)>,
        context in proptest::collection::vec(any::<u8>(), 1..100),
        most in prop_oneof![1usize..20, 1000usize..100_000],
        seed: u64,
    ) {
        let (mode, khz, nsec, incarnation) = tsc;
        let tsc = TscInfo { mode, khz, nsec, incarnation };
        let mut stream = headers(&DOMAIN).to_vec();
        stream.extend(record(RecordType::X86_CPUID_POLICY, &[1; 48]));
        stream.extend(record(RecordType::X86_MSR_POLICY, &[2; 32]));
        stream.extend(record(RecordType(0x8000_0007), b"optional"));
        stream.extend(record(RecordType::STATIC_DATA_END, &[]));
        let mut image = vec![0; NR_PFNS as usize * PAGE_SIZE];
        let mut records = Vec::new();
        for (batch, slot_pages, external) in &batches {
            write_batch(batch, *slot_pages, *external, &mut stream, &mut records);
            // An entry without data leaves the page what an earlier record made it.
            for (pfn, fill) in batch.iter().filter_map(|(pfn, page)| Some((*pfn, page.ok()?))) {
                image[pfn as usize * PAGE_SIZE..][..PAGE_SIZE].fill(fill);
            }
        }
        stream.extend(tsc_info(&tsc));
        stream.extend(record(RecordType::HVM_CONTEXT, &context));
        stream.extend(hvm_params(&params));
        stream.extend(end());
        let len = stream.len() as u64;
        stream.extend(b"sentinel");

        let input = Choppy::new(&stream[..], most, seed);
        let mut reader = StreamReader::open(input, Limits::new(NR_PFNS)).unwrap();
        prop_assert_eq!(reader.domain(), &DOMAIN);
        prop_assert_eq!(reader.next_record().unwrap(), Record::CpuidPolicy(vec![1; 48]));
        prop_assert_eq!(reader.next_record().unwrap(), Record::MsrPolicy(vec![2; 32]));
        let skipped = Record::Skipped { kind: RecordType(0x8000_0007), len: 8 };
        prop_assert_eq!(reader.next_record().unwrap(), skipped);
        prop_assert_eq!(reader.next_record().unwrap(), Record::StaticDataEnd);
        let mut received = vec![0; image.len()];
        for entries in &records {
            prop_assert_eq!(reader.next_record().unwrap(), Record::PageData);
            prop_assert_eq!(reader.entries(), &entries[..]);
            reader.read_pages(&mut places(&mut received)).unwrap();
        }
        prop_assert!(received == image);
        prop_assert_eq!(reader.next_record().unwrap(), Record::TscInfo(tsc));
        prop_assert_eq!(reader.next_record().unwrap(), Record::HvmContext(context));
        prop_assert_eq!(reader.next_record().unwrap(), Record::HvmParams(params));
        prop_assert_eq!(reader.next_record().unwrap(), Record::End);
        prop_assert_eq!(reader.offset(), len);
    }
}

#[test]
fn nothing_behind_end_is_taken() {
    let (parts, _) = small_stream();
    let stream: Vec<u8> = parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
    let input = [&stream[..], b"sentinel"].concat();
    let mut reader = StreamReader::open(&input[..], Limits::new(NR_PAGES)).unwrap();
    loop {
        match reader.next_record().unwrap() {
            Record::PageData => reader.skip_pages().unwrap(),
            Record::End => break,
            _ => {}
        }
    }
    let error = reader.next_record().unwrap_err();
    assert!(matches!(error.fault, Fault::Ended), "{error}");
    assert_eq!(reader.offset(), stream.len() as u64);
    assert_eq!(reader.into_inner(), b"sentinel");
}

#[test]
fn a_record_of_more_runs_than_one_vectored_read_takes_is_read_in_several() {
    // Twice as many as the kernel takes, so that in the last read the header of the next record has to find room too.
    // The writer's records are shorter, so this one is put together here.
    let pages: Vec<u64> = (0..2048).map(|nth| nth * 2).collect();
    let mut body = (pages.len() as u64).to_le_bytes().to_vec();
    body.extend(pages.iter().flat_map(|pfn| pfn.to_le_bytes()));
    body.extend(pages.iter().flat_map(|pfn| [(pfn % 251) as u8; PAGE_SIZE]));
    let stream = [&stream_head(&DOMAIN)[..], &record(RecordType::PAGE_DATA, &body), &end()].concat();
    for most in [100_000, usize::MAX >> 1] {
        let mut reader = StreamReader::open(Choppy::new(&stream[..], most, 1), Limits::new(4096)).unwrap();
        assert_eq!(reader.next_record().unwrap(), Record::StaticDataEnd);
        assert_eq!(reader.next_record().unwrap(), Record::PageData);
        let mut image = vec![0; 4096 * PAGE_SIZE];
        reader.read_pages(&mut places(&mut image)).unwrap();
        for (pfn, page) in image.chunks(PAGE_SIZE).enumerate() {
            let fill = if pfn % 2 == 0 { (pfn % 251) as u8 } else { 0 };
            assert!(page.iter().all(|byte| *byte == fill), "page {pfn:#x}");
        }
        assert_eq!(reader.next_record().unwrap(), Record::End);
    }
}
