//! What a stream says of a guest once all of it is applied: a digest of each page, and the records that are not pages.
//!
//! By it two streams of the same stopped guest are compared, whoever wrote them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Chain, Cursor, Read};

use super::arena_context::page_digest;
use super::error::StreamError;
use super::reader::{Limits, Record, StreamReader};
use super::records::{DomainHeader, PageKind, TscInfo};
use super::saved_context::differ_in_tsc_only;
use crate::page::{CHUNK_PAGES, PAGE_SIZE, Pfn, is_zero};

/// First bytes of what xl writes in front of libxl's stream, and how much of it comes before its optional part.
const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const XL_HEADER_LEN: usize = 48;

/// First bytes of libxl's stream ("LibxlFmt"); behind its header there is a record without a body, and then the stream.
const LIBXL_MAGIC: &[u8; 8] = b"LibxlFmt";
const LIBXL_HEADER_AND_RECORD_LEN: usize = 16 + 8;

/// The longest configuration that xl may have written in front.
const XL_OPTIONAL_MAX: u32 = 16 << 20;

/// What a page is when the stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Populated, with contents of this digest.
    Data(u64),
    /// Populated, contents undefined.
    Allocated,
}

/// How many of what were in a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// PAGE_DATA records.
    pub page_records: u64,
    /// Pages with data.
    pub data_entries: u64,
    /// Of those, pages of zeroes.
    pub zero_entries: u64,
    /// Pages allocated without data (XALLOC).
    pub alloc_entries: u64,
    /// Holes that were named (XTAB, BROKEN).
    pub hole_entries: u64,
    /// Chunks of 2 MiB all pages of which are named for the first time in one record, by which a receiver can build a superpage.
    pub whole_chunks: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// A guest as a stream leaves it.
pub struct Image {
    /// Whose it is.
    pub domain: DomainHeader,
    /// Every populated page.
    pub pages: BTreeMap<Pfn, PageState>,
    /// CPUID policy, as in the record; empty without one.
    pub cpuid: Vec<u8>,
    /// MSR policy, as in the record; empty without one.
    pub msrs: Vec<u8>,
    /// Time stamp counter.
    pub tsc: Option<TscInfo>,
    /// State of vCPUs and platform.
    pub context: Vec<u8>,
    /// HVM parameters.
    pub params: Vec<(u64, u64)>,
    /// What was in the stream.
    pub tally: Tally,
}

/// In what two images differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Pages with data in both.
    pub compared: u64,
    /// Pages with data in both that differ.
    pub contents: Vec<u64>,
    /// Pages that only one of them has with data.
    pub only_one: Vec<u64>,
    /// Names of the other records that differ.
    pub records: Vec<&'static str>,
    /// The TSC in HVM_CONTEXT differs and nothing else of it, which is the time between two savings of one suspended guest.
    pub tsc_went_on: bool,
}

impl Difference {
    /// Whether there is none, but for the time at which they were saved.
    pub fn is_none(&self) -> bool {
        self.contents.is_empty() && self.only_one.is_empty() && self.records.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            let but = if self.tsc_went_on { ", but that the TSC has gone on" } else { "" };
            return write!(f, "equal: {} pages and all other records{but}", self.compared);
        }
        write!(f, "{} of {} pages differ", self.contents.len(), self.compared)?;
        let first =
            |pfns: &[u64]| pfns.iter().take(8).map(|pfn| format!("{pfn:#x}")).collect::<Vec<_>>().join(" ");
        if !self.contents.is_empty() {
            write!(f, " ({} ...)", first(&self.contents))?;
        }
        if !self.only_one.is_empty() {
            write!(f, "; {} are in one of them only ({} ...)", self.only_one.len(), first(&self.only_one))?;
        }
        if !self.records.is_empty() {
            write!(f, "; records that differ: {}", self.records.join(", "))?;
        }
        Ok(())
    }
}

impl Image {
    /// Reads all of a stream, by the strict rules of [`StreamReader`].
    pub fn read<R: Read>(input: R, limits: Limits) -> Result<Self, StreamError> {
        let mut reader = StreamReader::open(input, limits)?;
        let mut image = Image {
            domain: *reader.domain(),
            pages: BTreeMap::new(),
            cpuid: Vec::new(),
            msrs: Vec::new(),
            tsc: None,
            context: Vec::new(),
            params: Vec::new(),
            tally: Tally::default(),
        };
        loop {
            match reader.next_record()? {
                Record::PageData => image.take_pages(&mut reader)?,
                Record::CpuidPolicy(body) => image.cpuid = body,
                Record::MsrPolicy(body) => image.msrs = body,
                Record::TscInfo(info) => image.tsc = Some(info),
                Record::HvmContext(body) => image.context = body,
                Record::HvmParams(params) => image.params = params,
                Record::StaticDataEnd | Record::Skipped { .. } => {}
                Record::End => break,
            }
        }
        image.tally.bytes = reader.offset();
        Ok(image)
    }

    fn take_pages<R: Read>(&mut self, reader: &mut StreamReader<R>) -> Result<(), StreamError> {
        let entries = reader.entries().to_vec();
        let data_pages = entries.iter().filter(|entry| entry.kind.carries_data()).count();
        let mut data = vec![0; data_pages * PAGE_SIZE];
        let mut rest = &mut data[..];
        reader.read_pages(&mut |_, pages| {
            let (run, behind) = std::mem::take(&mut rest).split_at_mut(pages * PAGE_SIZE);
            rest = behind;
            run
        })?;
        self.tally.page_records += 1;
        let (mut pages, _) = data.as_chunks::<PAGE_SIZE>();
        let mut run = 0;
        let mut last = None;
        for entry in &entries {
            let first_time = !self.pages.contains_key(&entry.pfn);
            match entry.kind {
                PageKind::Alloc => {
                    self.tally.alloc_entries += 1;
                    self.pages.entry(entry.pfn).or_insert(PageState::Allocated);
                }
                kind if kind.carries_data() => {
                    let [page, behind @ ..] = pages else {
                        unreachable!("a page for each entry that carries data")
                    };
                    pages = behind;
                    self.tally.data_entries += 1;
                    self.tally.zero_entries += u64::from(is_zero(page));
                    self.pages.insert(entry.pfn, PageState::Data(page_digest(entry.pfn, page)));
                }
                _ => self.tally.hole_entries += 1,
            }
            let populates = entry.kind.carries_data() || entry.kind == PageKind::Alloc;
            let goes_on = last == entry.pfn.0.checked_sub(1) && entry.pfn.in_chunk() != 0;
            run = match (populates && first_time, goes_on) {
                (true, true) if run > 0 => run + 1,
                (true, _) if entry.pfn.in_chunk() == 0 => 1,
                _ => 0,
            };
            self.tally.whole_chunks += u64::from(run == CHUNK_PAGES);
            last = Some(entry.pfn.0);
        }
        Ok(())
    }

    /// In what this image and `other` differ. A page that is allocated without data counts as one without data.
    pub fn difference(&self, other: &Image) -> Difference {
        let mut difference = Difference::default();
        let data = |state: Option<&PageState>| match state {
            Some(PageState::Data(digest)) => Some(*digest),
            _ => None,
        };
        for (pfn, state) in &self.pages {
            match (data(Some(state)), data(other.pages.get(pfn))) {
                (Some(mine), Some(theirs)) => {
                    difference.compared += 1;
                    if mine != theirs {
                        difference.contents.push(pfn.0);
                    }
                }
                (None, None) => {}
                _ => difference.only_one.push(pfn.0),
            }
        }
        for (pfn, state) in &other.pages {
            if !self.pages.contains_key(pfn) && data(Some(state)).is_some() {
                difference.only_one.push(pfn.0);
            }
        }
        difference.tsc_went_on = differ_in_tsc_only(&self.context, &other.context);
        let same_context = self.context == other.context || difference.tsc_went_on;
        let mut record = |equal: bool, name| {
            if !equal {
                difference.records.push(name);
            }
        };
        record(self.domain == other.domain, "domain header");
        record(self.cpuid == other.cpuid, "X86_CPUID_POLICY");
        record(self.msrs == other.msrs, "X86_MSR_POLICY");
        record(self.tsc == other.tsc, "X86_TSC_INFO");
        record(same_context, "HVM_CONTEXT");
        record(self.params == other.params, "HVM_PARAMS");
        difference
    }
}

/// The migration stream in `input`: all of it, or what is behind the headers of xl and libxl if it begins with those.
pub fn unwrap_xl<R: Read>(mut input: R) -> io::Result<Chain<Cursor<Vec<u8>>, R>> {
    let mut head = vec![0; 8];
    input.read_exact(&mut head)?;
    if head[..] == XL_MAGIC[..8] {
        let mut rest = [0; XL_HEADER_LEN - 8];
        input.read_exact(&mut rest)?;
        let optional = u32::from_ne_bytes([rest[36], rest[37], rest[38], rest[39]]);
        if rest[..24] != XL_MAGIC[8..] || optional > XL_OPTIONAL_MAX {
            return Err(io::Error::other("the header of xl's file makes no sense"));
        }
        io::copy(&mut (&mut input).take(optional.into()), &mut io::sink())?;
        input.read_exact(&mut head)?;
    }
    if head[..] == LIBXL_MAGIC[..] {
        let mut rest = [0; LIBXL_HEADER_AND_RECORD_LEN - 8];
        input.read_exact(&mut rest)?;
        if rest[8..] != [1, 0, 0, 0, 0, 0, 0, 0] {
            return Err(io::Error::other("the first record of libxl's stream is not LIBXC_CONTEXT"));
        }
        head.clear();
    }
    Ok(Cursor::new(head).chain(input))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{GuestType, HEADER_ROOM, PageRecord, end, hvm_params, stream_head};

    const DOMAIN: DomainHeader = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };

    /// A record of these pages, each filled with a byte or allocated only.
    fn pages(of: impl IntoIterator<Item = (u64, Option<u8>)>) -> Vec<u8> {
        let mut slot = vec![0; HEADER_ROOM + 8 * PAGE_SIZE];
        let mut record = PageRecord::new(&mut slot);
        for (pfn, byte) in of {
            match byte {
                Some(byte) => {
                    record.next_page().fill(byte);
                    record.commit(Pfn(pfn));
                }
                None => record.push_empty(Pfn(pfn), PageKind::Alloc),
            }
        }
        let range = record.finish();
        slot[range].to_vec()
    }

    fn read(records: &[Vec<u8>]) -> Image {
        let stream = [stream_head(&DOMAIN), records.concat(), end().to_vec()].concat();
        Image::read(&stream[..], Limits::new(1 << 20)).unwrap()
    }

    #[test]
    fn the_last_version_of_a_page_counts_and_what_differs_is_named() {
        let once = read(&[pages([(3, Some(7)), (5, Some(0)), (9, None)]), hvm_params(&[(1, 2)])]);
        let twice = read(&[
            pages([(3, Some(1)), (5, None)]),
            pages([(5, Some(0))]),
            pages([(3, Some(7))]),
            hvm_params(&[(1, 2)]),
        ]);
        assert_eq!(once.difference(&twice), Difference { compared: 2, ..Difference::default() });
        assert_eq!(
            (twice.tally.data_entries, twice.tally.zero_entries, twice.tally.alloc_entries),
            (3, 1, 1)
        );
        let other = read(&[pages([(3, Some(1)), (5, Some(0)), (9, Some(4))]), hvm_params(&[(1, 3)])]);
        let difference = once.difference(&other);
        assert_eq!((difference.contents, difference.only_one), (vec![3], vec![9]));
        assert_eq!(difference.records, ["HVM_PARAMS"]);
        assert!(twice.difference(&other).to_string().contains("0x3"));
    }

    #[test]
    fn a_chunk_counts_as_whole_if_all_of_it_is_named_at_once_and_first() {
        let all = |with: u64| (512..1024).map(move |pfn| (pfn, (pfn == with).then_some(1)));
        assert_eq!(read(&[pages(all(700))]).tally.whole_chunks, 1);
        assert_eq!(
            read(&[pages(all(512)), pages(all(513))]).tally.whole_chunks,
            1,
            "the second time it is not new"
        );
        assert_eq!(read(&[pages([(600, Some(1))]), pages(all(700))]).tally.whole_chunks, 0);
        assert_eq!(read(&[pages(all(0).filter(|(pfn, _)| *pfn != 800))]).tally.whole_chunks, 0);
        assert_eq!(read(&[pages((513..1025).map(|pfn| (pfn, None)))]).tally.whole_chunks, 0, "not aligned");
    }

    #[test]
    fn a_file_of_xl_is_unwrapped() {
        let plain = [stream_head(&DOMAIN), pages([(3, Some(7))]), end().to_vec()].concat();
        let config = b"{\"c_info\": {}}";
        let length = (config.len() as u32 + 4).to_ne_bytes();
        let words = [0x0102_0304u32, 3, 0].map(u32::to_ne_bytes).concat();
        let xl = [&XL_MAGIC[..], &words, &length, &(config.len() as u32).to_ne_bytes(), config].concat();
        let libxl = [&LIBXL_MAGIC[..], &2u32.to_be_bytes(), &[0; 4], &1u32.to_le_bytes(), &[0; 4]].concat();
        for wrapped in [plain.clone(), [libxl.clone(), plain.clone()].concat(), [xl, libxl, plain].concat()] {
            let image = Image::read(unwrap_xl(&wrapped[..]).unwrap(), Limits::new(100)).unwrap();
            assert_eq!(image.pages.len(), 1);
        }
    }
}
