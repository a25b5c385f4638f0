//! Streams that are cut off, damaged or nonsense from the start.

use super::sample::{DOMAIN, page_data, receive, small_stream};
use super::*;
use crate::page::PAGE_SIZE;
use proptest::prelude::*;

fn whole(parts: &[(&str, Vec<u8>)]) -> Vec<u8> {
    parts.iter().flat_map(|(_, bytes)| bytes).copied().collect()
}

#[test]
fn the_small_stream_is_received() {
    let (parts, image) = small_stream();
    assert_eq!(receive(&whole(&parts)[..]).expect("a good stream"), (DOMAIN, image));
}

#[test]
fn a_stream_cut_anywhere_is_an_error_that_names_record_and_offset() {
    let (parts, _) = small_stream();
    let stream = whole(&parts);
    let mut start = 0;
    for (part, (name, bytes)) in parts.iter().enumerate() {
        for cut in start..start + bytes.len() {
            let error = receive(&stream[..cut]).expect_err("a cut stream").to_string();
            let place = match part {
                0 | 1 => format!("{name} (offset {start:#x})"),
                _ if cut - start < 8 => format!("record header (record {}, offset {start:#x})", part - 2),
                _ => format!("{name} (record {}, offset {start:#x})", part - 2),
            };
            let ends = format!("{place}: the stream ends at offset {cut:#x}, ");
            assert!(error.starts_with(&ends), "cut at {cut:#x}: {error}");
        }
        start += bytes.len();
    }
}

#[test]
fn a_flipped_byte_is_an_error_or_changes_nothing() {
    let (parts, image) = small_stream();
    let stream = whole(&parts);
    let expected = (DOMAIN, image);
    let mut accepted = Vec::new();
    for at in 0..stream.len() {
        for mask in [0x01, 0x80, 0xff] {
            let mut damaged = stream.clone();
            damaged[at] ^= mask;
            if let Ok(received) = receive(&damaged[..]) {
                assert_eq!(received, expected, "byte {at:#x}, mask {mask:#x}");
                accepted.push((at, mask));
            }
        }
    }
    // What may change unnoticed is what does not touch the image: the records without data, and page types. In the
    // headers and in the data nothing may.
    let first_pass = parts[..3].iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    let data = first_pass + parts[3].1.len() + parts[4].1.len() - 2 * PAGE_SIZE;
    assert!(accepted.iter().all(|(at, _)| (first_pass..data).contains(at)), "{accepted:x?}");
}

/// Reads all that can be read, checking that nothing was taken on the word of the stream alone.
fn read_within_bounds(input: &[u8]) -> Result<(), StreamError> {
    let limits = Limits { nr_pfns: 64, max_entries: 16 };
    let mut reader = StreamReader::open(input, limits)?;
    loop {
        match reader.next_record()? {
            Record::PageData => {
                assert!((1..=16).contains(&reader.entries().len()));
                assert!(reader.entries().iter().all(|entry| entry.pfn.0 < 64));
                reader.skip_pages()?;
            }
            Record::CpuidPolicy(body) | Record::MsrPolicy(body) | Record::HvmContext(body) => {
                assert!(body.len() < input.len());
            }
            Record::HvmParams(params) => assert!(params.len() * 16 < input.len()),
            Record::End => return Ok(()),
            Record::StaticDataEnd | Record::TscInfo(_) | Record::Skipped { .. } => {}
        }
    }
}

/// A record that a receiver could be sent: mostly of a known type, with a length that may be wrong.
fn any_record() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![0u32..0x14, Just(0x8000_0001), any::<u32>()];
    let body = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        proptest::collection::vec(0u8..3, 0..64),
        Just(page_data(&[(3, 3), (5, 5)])[8..].to_vec()),
    ];
    (kind, body, prop_oneof![9 => Just(None), 1 => any::<u32>().prop_map(Some)]).prop_map(
        |(kind, body, len)| {
            let mut bytes = record(RecordType(kind), &body);
            if let Some(len) = len {
                bytes[4..8].copy_from_slice(&len.to_le_bytes());
            }
            bytes
        },
    )
}

proptest! {
    #[test]
    fn garbage_is_never_more_than_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read_within_bounds(&bytes);
        let _ = read_within_bounds(&[&headers(&DOMAIN)[..], &bytes].concat());
        let _ = read_within_bounds(&[&stream_head(&DOMAIN)[..], &bytes].concat());
    }

    #[test]
    fn records_in_any_order_are_never_more_than_an_error(
        records in proptest::collection::vec(any_record(), 0..6),
    ) {
        let _ = read_within_bounds(&[&headers(&DOMAIN)[..], &records.concat()].concat());
        let _ = read_within_bounds(&[&stream_head(&DOMAIN)[..], &records.concat()].concat());
    }
}
