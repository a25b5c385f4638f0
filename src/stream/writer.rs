//! Lays records out in memory. Page data go from guest memory into a slot once, to the place from which they are
//! sent; everything else is small and comes as an owned buffer. What is laid out wrongly is the caller's mistake,
//! so it panics.

use super::records::*;
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn};
use std::ops::Range;

/// Bytes of a slot in front of its data pages; the record's header ends where the first data page begins.
/// A slot has `HEADER_ROOM + n * PAGE_SIZE` bytes.
pub const HEADER_ROOM: usize = 8192;

/// The most entries of one [`PageRecord`]: as many as fit into [`HEADER_ROOM`] behind the fixed fields. (Xen's own
/// saver puts up to 1024 into a record; the format has no limit but the length.) All pages of a 2 MiB chunk fit.
pub const MAX_ENTRIES: usize = (HEADER_ROOM - FIXED_LEN) / 8;

/// Bytes in front of the PFN array of a PAGE_DATA record.
const FIXED_LEN: usize = RECORD_HEADER_LEN + PAGE_DATA_HEAD_LEN;

const _: () = assert!(HEADER_ROOM.is_multiple_of(PAGE_SIZE) && MAX_ENTRIES >= CHUNK_PAGES);

/// Where the data of a record's pages are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Data {
    /// No entry has carried data yet.
    None,
    /// In the slot.
    InSlot,
    /// Sent from elsewhere, right behind the header.
    External,
}

/// One PAGE_DATA record, laid out in a slot: data pages from [`HEADER_ROOM`] on, page by page, and the header
/// directly in front of them, so that the record is one range of bytes.
///
/// How long the header is shows only at the end. Until then the PFN array grows from the front of the header room;
/// [`finish`](Self::finish) moves it up against the data.
pub struct PageRecord<'a> {
    slot: &'a mut [u8],
    entries: usize,
    data_pages: usize,
    data: Data,
    last: Option<Pfn>,
}

impl<'a> PageRecord<'a> {
    /// An empty record in `slot`. Panics if the slot has not [`HEADER_ROOM`] bytes and whole pages behind them.
    pub fn new(slot: &'a mut [u8]) -> Self {
        let len = slot.len();
        assert!(
            len >= HEADER_ROOM && len.is_multiple_of(PAGE_SIZE),
            "a slot of {len} bytes does not hold the header room and whole pages"
        );
        PageRecord { slot, entries: 0, data_pages: 0, data: Data::None, last: None }
    }

    /// Whether one more entry with its data fits into the slot; never with external pages.
    pub fn has_room(&self) -> bool {
        !self.is_full()
            && self.data != Data::External
            && HEADER_ROOM + (self.data_pages + 1) * PAGE_SIZE <= self.slot.len()
    }

    /// Whether the record has [`MAX_ENTRIES`], so that not even an entry without data fits.
    pub fn is_full(&self) -> bool {
        self.entries == MAX_ENTRIES
    }

    /// Where the next data page goes. What is written there is part of the record only after
    /// [`commit`](Self::commit). Panics if there is no room.
    pub fn next_page(&mut self) -> &mut [u8; PAGE_SIZE] {
        assert!(self.has_room(), "no room for another page in the slot");
        let (pages, _) = self.slot.as_chunks_mut();
        &mut pages[HEADER_ROOM / PAGE_SIZE + self.data_pages]
    }

    /// Adds the page that was written to [`next_page`](Self::next_page). Panics if there is no room, if `pfn` is
    /// not above the one before, or if the record has external pages.
    pub fn commit(&mut self, pfn: Pfn) {
        self.push_data(pfn, Data::InSlot);
    }

    /// Adds an entry whose 4096 bytes the caller sends from elsewhere: behind the header, in the order of the
    /// entries. Panics if the record is full, if `pfn` is not above the one before, or if the record has pages
    /// in the slot.
    pub fn push_external(&mut self, pfn: Pfn) {
        self.push_data(pfn, Data::External);
    }

    /// Adds an entry without data. Panics if `kind` has data, if the record is full, or if `pfn` is not above the
    /// one before.
    pub fn push_empty(&mut self, pfn: Pfn, kind: PageKind) {
        assert!(!kind.carries_data(), "{kind:?} of page {pfn} is not without data");
        self.push(PageEntry { pfn, kind });
    }

    /// Entries so far.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Entries so far that carry data, in the slot or external.
    pub fn data_pages(&self) -> usize {
        self.data_pages
    }

    /// Whether there is no entry yet; an empty record cannot be finished.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Writes the header and returns where in the slot the record is; with external pages, where its header is,
    /// which accounts for them. Panics if the record is empty, because the format has no such record.
    pub fn finish(self) -> Range<usize> {
        assert!(!self.is_empty(), "a PAGE_DATA record has at least one entry");
        let table_len = self.entries * 8;
        let start = HEADER_ROOM - FIXED_LEN - table_len;
        self.slot.copy_within(FIXED_LEN..FIXED_LEN + table_len, start + FIXED_LEN);
        // In range of u32 by far: a record has at most MAX_ENTRIES pages.
        let body_len = PAGE_DATA_HEAD_LEN + table_len + self.data_pages * PAGE_SIZE;
        let head = &mut self.slot[start..start + FIXED_LEN];
        head[0..4].copy_from_slice(&RecordType::PAGE_DATA.0.to_le_bytes());
        head[4..8].copy_from_slice(&(body_len as u32).to_le_bytes());
        head[8..12].copy_from_slice(&(self.entries as u32).to_le_bytes());
        head[12..16].fill(0);
        let in_slot = if self.data == Data::InSlot { self.data_pages } else { 0 };
        start..HEADER_ROOM + in_slot * PAGE_SIZE
    }

    fn push_data(&mut self, pfn: Pfn, data: Data) {
        let unmixed = self.data == Data::None || self.data == data;
        assert!(unmixed, "pages in the slot and external pages in one record");
        assert!(data == Data::External || self.has_room(), "no room for another page in the slot");
        self.data = data;
        self.push(PageEntry { pfn, kind: PageKind::NoTab });
        self.data_pages += 1;
    }

    fn push(&mut self, entry: PageEntry) {
        assert!(!self.is_full(), "a record has at most {MAX_ENTRIES} entries");
        // The reader insists on it: it makes the runs of a record disjoint.
        assert!(self.last.is_none_or(|last| last < entry.pfn), "page {} does not ascend", entry.pfn);
        self.last = Some(entry.pfn);
        let at = FIXED_LEN + self.entries * 8;
        self.slot[at..at + 8].copy_from_slice(&entry.to_word().to_le_bytes());
        self.entries += 1;
    }
}

/// The image header and the domain header. Records that must come before STATIC_DATA_END follow these.
pub fn headers(domain: &DomainHeader) -> [u8; IMAGE_HEADER_LEN + DOMAIN_HEADER_LEN] {
    let mut bytes = [0; IMAGE_HEADER_LEN + DOMAIN_HEADER_LEN];
    // The image header is big-endian, whatever the rest of the stream is. Options 0 says: little-endian.
    bytes[0..8].copy_from_slice(&MARKER.to_be_bytes());
    bytes[8..12].copy_from_slice(&ID.to_be_bytes());
    bytes[12..16].copy_from_slice(&VERSION.to_be_bytes());
    bytes[IMAGE_HEADER_LEN..].copy_from_slice(&domain.to_bytes());
    bytes
}

/// The start of a stream without CPUID and MSR policies: both headers and STATIC_DATA_END.
pub fn stream_head(domain: &DomainHeader) -> Vec<u8> {
    [&headers(domain)[..], &record(RecordType::STATIC_DATA_END, &[])].concat()
}

/// A record of any other type, padded. Panics if the body is longer than [`REC_LENGTH_MAX`].
pub fn record(kind: RecordType, body: &[u8]) -> Vec<u8> {
    assert!(body.len() <= REC_LENGTH_MAX as usize, "{kind} of {} bytes is too long", body.len());
    let len = RECORD_HEADER_LEN + body.len();
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    bytes.extend_from_slice(&kind.0.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(len.next_multiple_of(8), 0);
    bytes
}

/// An X86_TSC_INFO record.
pub fn tsc_info(info: &TscInfo) -> Vec<u8> {
    let mut body = [0; TSC_INFO_LEN];
    body[0..4].copy_from_slice(&info.mode.to_le_bytes());
    body[4..8].copy_from_slice(&info.khz.to_le_bytes());
    body[8..16].copy_from_slice(&info.nsec.to_le_bytes());
    body[16..20].copy_from_slice(&info.incarnation.to_le_bytes());
    record(RecordType::X86_TSC_INFO, &body)
}

/// An HVM_PARAMS record of these (index, value) pairs.
pub fn hvm_params(params: &[(u64, u64)]) -> Vec<u8> {
    let mut body = Vec::with_capacity(HVM_PARAMS_HEAD_LEN + params.len() * HVM_PARAM_LEN);
    body.extend_from_slice(&(params.len() as u64).to_le_bytes());
    for (index, value) in params {
        body.extend_from_slice(&index.to_le_bytes());
        body.extend_from_slice(&value.to_le_bytes());
    }
    record(RecordType::HVM_PARAMS, &body)
}

/// The END record.
pub fn end() -> [u8; RECORD_HEADER_LEN] {
    [0; RECORD_HEADER_LEN]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(pages: usize) -> Vec<u8> {
        vec![0xee; HEADER_ROOM + pages * PAGE_SIZE]
    }

    #[test]
    fn a_record_is_laid_out_as_the_specification_says() {
        let mut slot = slot(2);
        let mut pages = PageRecord::new(&mut slot);
        pages.next_page().fill(1);
        pages.commit(Pfn(0x12));
        pages.push_empty(Pfn(0x13), PageKind::Xtab);
        pages.next_page().fill(2);
        pages.commit(Pfn(0x14));
        assert!(!pages.has_room() && !pages.is_full());
        assert_eq!((pages.entries(), pages.data_pages()), (3, 2));
        let range = pages.finish();
        let mut expected = Vec::new();
        expected.extend_from_slice(&[1, 0, 0, 0]);
        expected.extend_from_slice(&(8 + 3 * 8 + 2 * 4096u32).to_le_bytes());
        expected.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(&[0x12, 0, 0, 0, 0, 0, 0, 0x00]);
        expected.extend_from_slice(&[0x13, 0, 0, 0, 0, 0, 0, 0xf0]);
        expected.extend_from_slice(&[0x14, 0, 0, 0, 0, 0, 0, 0x00]);
        expected.extend_from_slice(&[1; 4096]);
        expected.extend_from_slice(&[2; 4096]);
        assert_eq!(slot[range], expected);
    }

    #[test]
    fn a_full_header_fills_the_header_room_and_no_more() {
        let mut slot = slot(MAX_ENTRIES + 2);
        let mut pages = PageRecord::new(&mut slot);
        while pages.has_room() {
            pages.commit(Pfn(pages.entries() as u64));
        }
        assert!(pages.is_full());
        assert_eq!(pages.finish(), 0..HEADER_ROOM + MAX_ENTRIES * PAGE_SIZE);
        assert_eq!(u64_at(&slot, FIXED_LEN), 0);
        assert_eq!(u64_at(&slot, HEADER_ROOM - 8), MAX_ENTRIES as u64 - 1);
    }

    #[test]
    fn external_pages_are_in_the_length_but_not_in_the_range() {
        let mut slot = slot(0);
        let mut pages = PageRecord::new(&mut slot);
        assert!(pages.is_empty() && !pages.has_room());
        pages.push_external(Pfn(1));
        pages.push_empty(Pfn(2), PageKind::Alloc);
        pages.push_external(Pfn(3));
        let range = pages.finish();
        assert_eq!(range, HEADER_ROOM - 40..HEADER_ROOM);
        assert_eq!(u32_at(&slot[range], 4), 8 + 3 * 8 + 2 * 4096);
    }

    #[test]
    #[should_panic(expected = "external pages")]
    fn external_pages_and_pages_in_the_slot_do_not_mix() {
        let mut slot = slot(1);
        let mut pages = PageRecord::new(&mut slot);
        pages.push_external(Pfn(1));
        pages.commit(Pfn(2));
    }

    #[test]
    #[should_panic(expected = "does not ascend")]
    fn a_page_is_in_a_record_once() {
        let mut slot = slot(0);
        let mut pages = PageRecord::new(&mut slot);
        pages.push_empty(Pfn(5), PageKind::Alloc);
        pages.push_empty(Pfn(5), PageKind::Xtab);
    }

    #[test]
    #[should_panic(expected = "not without data")]
    fn an_entry_with_data_is_not_pushed_without_them() {
        PageRecord::new(&mut slot(0)).push_empty(Pfn(5), PageKind::NoTab);
    }

    #[test]
    #[should_panic(expected = "at least one entry")]
    fn an_empty_record_is_not_finished() {
        PageRecord::new(&mut slot(0)).finish();
    }

    #[test]
    #[should_panic(expected = "no room")]
    fn a_page_beyond_the_slot_is_refused() {
        PageRecord::new(&mut slot(0)).next_page();
    }

    #[test]
    #[should_panic(expected = "whole pages")]
    fn a_slot_of_broken_pages_is_refused() {
        PageRecord::new(&mut [0; HEADER_ROOM + 1]);
    }

    #[test]
    fn records_are_padded_to_eight_bytes_with_zeros() {
        for len in 0..20 {
            let bytes = record(RecordType::HVM_CONTEXT, &vec![0xff; len]);
            assert_eq!(bytes.len(), 8 + len.next_multiple_of(8));
            assert_eq!(u32_at(&bytes, 4) as usize, len);
            assert!(bytes[8 + len..].iter().all(|byte| *byte == 0));
        }
        assert_eq!(record(RecordType::END, &[]), end());
    }
}
