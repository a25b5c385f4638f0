use super::*;
use crate::stream::sample::{DOMAIN, page_data, places};
use crate::stream::{end, headers, hvm_params, record, stream_head, tsc_info};

const LIMITS: Limits = Limits { nr_pfns: 0x20000, max_entries: 16 };

const TSC: TscInfo = TscInfo { mode: 1, khz: 2_400_000, nsec: 5, incarnation: 1 };

/// Reads to END or to the first error.
fn read_all(stream: &[u8]) -> Result<Vec<Record>, StreamError> {
    let mut reader = StreamReader::open(stream, LIMITS)?;
    let mut records = Vec::new();
    loop {
        let record = reader.next_record()?;
        match record {
            Record::End => return Ok(records),
            Record::PageData => reader.skip_pages()?,
            _ => {}
        }
        records.push(record);
    }
}

/// The error that the records raise behind the headers.
fn error_of(records: &[&[u8]]) -> String {
    let stream = [&headers(&DOMAIN)[..], &records.concat(), &end()].concat();
    read_all(&stream).expect_err("a bad stream").to_string()
}

/// The error that a record raises behind STATIC_DATA_END, which is 8 bytes at 0x28.
fn error_in_pages(bytes: &[u8]) -> String {
    error_of(&[&record(RecordType::STATIC_DATA_END, &[]), bytes])
}

/// A PAGE_DATA record with these words in front of `pages` pages.
fn page_record(count: u64, words: &[u64], pages: usize) -> Vec<u8> {
    let mut body = count.to_le_bytes().to_vec();
    body.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    body.resize(body.len() + pages * PAGE_SIZE, 0xab);
    record(RecordType::PAGE_DATA, &body)
}

#[test]
fn every_field_of_the_headers_is_checked() {
    let cases: [(usize, u8, &str); 14] = [
        (0, 0xfe, "image header (offset 0x0): the marker is 0xfeffffffffffffff and not all ones"),
        (8, b'x', "image header (offset 0x0): the id is 0x78454e46 and not \"XENF\""),
        (15, 2, "image header (offset 0x0): version 2 of the format is not supported"),
        (15, 4, "image header (offset 0x0): version 4 of the format is not supported"),
        (17, 1, "image header (offset 0x0): the stream is big-endian"),
        (17, 2, "image header (offset 0x0): reserved options must be zero but is 0x20000"),
        (19, 1, "image header (offset 0x0): reserved options must be zero but is 0x1"),
        (23, 1, "image header (offset 0x0): reserved field at the end must be zero but is 0x1"),
        (24, 0, "domain header (offset 0x18): guest type 0x0 is unknown"),
        (24, 1, "domain header (offset 0x18): the guest is PV; only streams of HVM and PVH"),
        (24, 3, "domain header (offset 0x18): guest type 0x3 is unknown"),
        (28, 13, "domain header (offset 0x18): the page shift is 13 and not 12"),
        (30, 1, "domain header (offset 0x18): reserved field after the page shift must be zero but is 0x1"),
        (31, 1, "domain header (offset 0x18): reserved field after the page shift must be zero but is 0x100"),
    ];
    for (at, value, expected) in cases {
        let mut stream = stream_head(&DOMAIN);
        stream[at] = value;
        let error = read_all(&stream).expect_err("a bad header").to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn every_word_of_page_data_is_checked() {
    let at = "PAGE_DATA (record 1, offset 0x30): ";
    let cases: [(Vec<u8>, &str); 14] = [
        (page_record(0, &[1], 0), "0 entries, but there must be between 1 and 16"),
        (page_record(17, &[1; 17], 0), "17 entries, but there must be between 1 and 16"),
        (page_record(0xffff_ffff, &[1], 1), "4294967295 entries, but there must be between 1 and 16"),
        (page_record(1 << 32 | 1, &[1], 1), "reserved field of the count must be zero but is 0x1"),
        (page_record(1, &[0x90000], 1), "PFN 0x90000 is outside the guest's 0x20000 pages"),
        (page_record(2, &[0x1ffff, 0x20000], 2), "PFN 0x20000 is outside the guest's 0x20000 pages"),
        (page_record(1, &[1 << 52], 1), "entry 0 is 0x0010000000000000, which has a reserved bit set"),
        (page_record(2, &[1, 5 << 60 | 2], 1), "entry 1 is 0x5000000000000002, which has a reserved bit set"),
        (page_record(2, &[2, 2], 2), "PFN 0x2 follows PFN 0x2, but entries must ascend"),
        (page_record(2, &[2, 1], 2), "PFN 0x1 follows PFN 0x2, but entries must ascend"),
        (
            page_record(1, &[1], 0),
            "a length of 16 contradicts 1 entries, 1 of them with data, which take 4112",
        ),
        (page_record(1, &[0xf << 60 | 1], 1), "a length of 4112 contradicts 1 entries, 0 of them with data"),
        (page_record(2, &[1], 0), "a length of 16 is wrong, it must be long enough for its entries"),
        (record(RecordType::PAGE_DATA, &[0; 8]), "a length of 8 is wrong, it must be a multiple of 8 and at"),
    ];
    for (bytes, expected) in cases {
        let error = error_in_pages(&bytes);
        assert!(error.starts_with(&format!("{at}{expected}")), "{error}");
    }
}

#[test]
fn bodies_have_the_length_that_their_type_demands() {
    let tsc_reserved = |at: usize| {
        let mut bytes = tsc_info(&TSC);
        bytes[8 + at] = 1;
        bytes
    };
    let params_count = |count: u8| {
        let mut bytes = hvm_params(&[(1, 2), (3, 4)]);
        bytes[8] = count;
        bytes
    };
    let with = |kind, len| record(kind, &vec![0; len]);
    let cases: [(Vec<u8>, &str); 13] = [
        (with(RecordType::END, 8), "END (record 1, offset 0x30): a length of 8 is wrong, it must be 0"),
        (with(RecordType::X86_TSC_INFO, 23), "a length of 23 is wrong, it must be 24"),
        (tsc_reserved(20), "reserved field at the end must be zero but is 0x1"),
        (with(RecordType::HVM_CONTEXT, 0), "a length of 0 is wrong, it must be more than 0"),
        (with(RecordType::HVM_PARAMS, 7), "a length of 7 is wrong, it must be at least 8"),
        (with(RecordType::HVM_PARAMS, 9), "a length of 9 contradicts 0 parameters"),
        (params_count(1), "a length of 40 contradicts 1 parameters"),
        (params_count(3), "a length of 40 contradicts 3 parameters"),
        (with(RecordType::HVM_PARAMS, (1 << 20) + 8), "a length of 1048584 is over the limit of 1048576"),
        ([9, 0, 0, 0x80, 1, 0, 0, 8].to_vec(), "a length of 134217729 is over the limit of 134217728 bytes"),
        ([9, 0, 0, 0, 1, 0, 0, 8].to_vec(), "a length of 134217729 is over the limit of 134217728 bytes"),
        ([9, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 1].to_vec(), "padding must be zero"),
        ([9, 0, 0, 0x80, 1, 0, 0, 0, 7, 1, 0, 0, 0, 0, 0, 0].to_vec(), "padding must be zero"),
    ];
    for (bytes, expected) in cases {
        let error = error_in_pages(&bytes);
        assert!(error.contains(expected), "{error}");
    }
    for (kind, len) in [(0x11, 0), (0x11, 16), (0x12, 0), (0x12, 24), (0x10, 8)] {
        let error = error_of(&[&with(RecordType(kind), len)]);
        assert!(error.contains(&format!("a length of {len} is wrong")), "{error}");
    }
}

#[test]
fn records_keep_to_the_order() {
    let cpuid = record(RecordType::X86_CPUID_POLICY, &[0; 24]);
    let msr = record(RecordType::X86_MSR_POLICY, &[0; 16]);
    let static_end = record(RecordType::STATIC_DATA_END, &[]);
    let pages = page_data(&[(1, 1)]);
    let tsc = tsc_info(&TSC);
    let context = record(RecordType::HVM_CONTEXT, &[1]);
    let params = hvm_params(&[]);
    let cases: [(&[&[u8]], &str); 13] = [
        (&[&pages], "PAGE_DATA (record 0, offset 0x28): it comes before STATIC_DATA_END"),
        (&[], "END (record 0, offset 0x28): it comes before STATIC_DATA_END"),
        (&[&tsc], "X86_TSC_INFO (record 0, offset 0x28): it comes before STATIC_DATA_END"),
        (&[&cpuid, &cpuid], "X86_CPUID_POLICY (record 1, offset 0x48): it is the second of its type"),
        (&[&msr, &msr], "X86_MSR_POLICY (record 1, offset 0x40): it is the second of its type"),
        (
            &[&static_end, &static_end],
            "STATIC_DATA_END (record 1, offset 0x30): it comes after STATIC_DATA_END",
        ),
        (&[&static_end, &cpuid], "X86_CPUID_POLICY (record 1, offset 0x30): it comes after STATIC_DATA_END"),
        (&[&static_end, &pages, &msr], "(record 2, offset 0x1048): it comes after STATIC_DATA_END"),
        (&[&static_end, &tsc, &pages], "(record 2, offset 0x50): it comes after the guest's final state"),
        (&[&static_end, &params, &pages], "(record 2, offset 0x40): it comes after the guest's final state"),
        (&[&static_end, &context, &context], "(record 2, offset 0x40): it is the second of its type"),
        (&[&static_end, &tsc, &context, &tsc], "(record 3, offset 0x60): it is the second of its type"),
        (&[&static_end, &params, &params], "(record 2, offset 0x40): it is the second of its type"),
    ];
    for (records, expected) in cases {
        let error = error_of(records);
        assert!(error.contains(expected), "{error}");
    }
    // The specification sends the parameters before the context, Xen's saver after it.
    for tail in [[&tsc, &context, &params], [&params, &context, &tsc]] {
        let parts = [&headers(&DOMAIN)[..], &msr, &cpuid, &static_end, &pages, &pages];
        let stream = [parts.concat(), tail.map(Vec::as_slice).concat(), end().to_vec()].concat();
        assert_eq!(read_all(&stream).expect("a good stream").len(), 8);
    }
}

#[test]
fn records_of_other_profiles_are_refused_and_optional_ones_skipped() {
    for kind in [0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f] {
        let kind = RecordType(kind);
        let error = error_in_pages(&record(kind, &[]));
        assert!(error.starts_with(&format!("{kind} (record 1, offset 0x30): not supported: ")), "{error}");
    }
    assert_eq!(
        error_in_pages(&record(RecordType(0x13), &[])),
        "record type 0x13 (record 1, offset 0x30): the type is mandatory and unknown"
    );
    let kind = RecordType(0x8000_0001);
    let stream = [&stream_head(&DOMAIN)[..], &record(kind, &[7; 20_001]), &end()].concat();
    assert_eq!(read_all(&stream).unwrap()[1], Record::Skipped { kind, len: 20_001 });
}

#[test]
fn pages_are_taken_when_they_are_due_and_only_then() {
    let stream = [&stream_head(&DOMAIN)[..], &page_data(&[(1, 1)]), &end()].concat();
    let open = || StreamReader::open(&stream[..], LIMITS).unwrap();

    let mut reader = open();
    let error = reader.read_pages(&mut places(&mut [])).unwrap_err();
    assert!(matches!(error.fault, Fault::NoPagesDue), "{error}");

    let mut reader = open();
    reader.next_record().unwrap();
    reader.next_record().unwrap();
    let error = reader.next_record().unwrap_err().to_string();
    assert!(error.starts_with("PAGE_DATA (record 1, offset 0x30): the data of this record"), "{error}");
    for _ in 0..2 {
        let error = reader.next_record().unwrap_err();
        assert!(matches!(error.fault, Fault::Stopped), "{error}");
    }
    assert!(matches!(reader.skip_pages().unwrap_err().fault, Fault::Stopped));
}

#[test]
#[should_panic(expected = "memory of the 1 pages from 0x1 on")]
fn a_place_of_the_wrong_size_is_the_callers_mistake() {
    let stream = [&stream_head(&DOMAIN)[..], &page_data(&[(1, 1)]), &end()].concat();
    let mut reader = StreamReader::open(&stream[..], LIMITS).unwrap();
    reader.next_record().unwrap();
    reader.next_record().unwrap();
    let _ = reader.read_pages(&mut |_, _| &mut []);
}

#[test]
fn page_tables_of_any_length_are_taken_in_whole_and_no_further() {
    // The count follows from the length only modulo 512: lengths around that are where a first read could go wrong.
    for count in [1, 2, 511, 512, 513, 1023, 1024, 1025, 1536] {
        for data in [0, 1, 2] {
            let words: Vec<u64> =
                (0..count).map(|pfn| if pfn < data { pfn } else { 0xe << 60 | pfn }).collect();
            let pages = data.min(count) as usize;
            let stream = [&stream_head(&DOMAIN)[..], &page_record(count, &words, pages), &end()].concat();
            let limits = Limits { max_entries: 1536, ..LIMITS };
            let mut reader = StreamReader::open(&stream[..], limits).unwrap();
            reader.next_record().unwrap();
            assert_eq!(reader.next_record().unwrap(), Record::PageData, "{count} {data}");
            assert_eq!(reader.entries().len() as u64, count);
            let mut image = vec![0; pages * PAGE_SIZE];
            reader.read_pages(&mut places(&mut image)).unwrap();
            assert!(image.iter().all(|byte| *byte == 0xab));
            assert_eq!(reader.next_record().unwrap(), Record::End);
            assert!(reader.into_inner().is_empty());
        }
    }
}

#[test]
fn the_tables_are_allocated_once_and_never_grow() {
    let words: Vec<u64> = (0..16).collect();
    let record = page_record(16, &words, 16);
    let stream = [&stream_head(&DOMAIN)[..], &record, &record, &end()].concat();
    let mut reader = StreamReader::open(&stream[..], LIMITS).unwrap();
    let taken = (reader.table.capacity(), reader.entries.capacity());
    reader.next_record().unwrap();
    for _ in 0..2 {
        reader.next_record().unwrap();
        reader.skip_pages().unwrap();
    }
    assert_eq!((reader.table.capacity(), reader.entries.capacity()), taken);
}
