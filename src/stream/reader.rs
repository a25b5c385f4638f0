//! The strict reader. Its input is hostile: it refuses whatever the format does not allow, takes memory only for
//! bytes that have arrived, and never takes a byte behind END, because that byte belongs to someone else (libxl
//! reads on from the same descriptor).

use super::error::{Fault, Place, StreamError};
use super::headers;
use super::order::Order;
use super::records::*;
use super::source::Source;
use crate::page::{PAGE_SIZE, Pfn};
use std::io::{IoSliceMut, Read};
use std::mem;

/// Buffers of one vectored read, `IOV_MAX` of Linux; the kernel refuses more.
const IOV_MAX: usize = 1024;

/// The longest policy or parameter record that is accepted. Stock savers send a few KiB.
const SMALL_BODY_MAX: u32 = 1 << 20;

/// 64-bit words in a page.
const WORDS_PER_PAGE: usize = PAGE_SIZE / 8;

/// What a stream may ask for at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the guest's page-number space; every PFN is below it.
    pub nr_pfns: u64,
    /// Entries of one PAGE_DATA record. The reader takes 24 bytes for each of them when it is opened.
    pub max_entries: u32,
}

impl Limits {
    /// Limits for a guest with `nr_pfns` page numbers: records of up to 4096 entries, where Xen's own saver
    /// stays within 1024.
    pub fn new(nr_pfns: u64) -> Self {
        Limits { nr_pfns, max_entries: 4096 }
    }
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// All static records have come.
    StaticDataEnd,
    /// Pages: see [`StreamReader::entries`] and [`StreamReader::read_pages`].
    PageData,
    /// `xen_cpuid_leaf_t[]`.
    CpuidPolicy(Vec<u8>),
    /// `xen_msr_entry_t[]`.
    MsrPolicy(Vec<u8>),
    /// Time stamp counter.
    TscInfo(TscInfo),
    /// State of vCPUs and platform; never empty.
    HvmContext(Vec<u8>),
    /// (index, value) pairs. Which indices are acceptable is for the receiver to say.
    HvmParams(Vec<(u64, u64)>),
    /// An optional record that is not known, already skipped.
    Skipped {
        /// Its type.
        kind: RecordType,
        /// Length of its body.
        len: u32,
    },
    /// The stream is complete.
    End,
}

/// What the caller has to do next.
enum Turn {
    /// Ask for a record.
    Record,
    /// Take the data of the PAGE_DATA record just returned.
    Pages,
    /// Nothing: END has come.
    Ended,
    /// Nothing: an error has come, and where the next record begins is unknown.
    Stopped,
}

/// Reads one stream.
///
/// Call [`next_record`](Self::next_record) until it returns [`Record::End`]; after each [`Record::PageData`] call
/// [`read_pages`](Self::read_pages) or [`skip_pages`](Self::skip_pages). The reader knows the order of records; that
/// the tail is complete is for the receiver to check, which alone knows what its guest needs.
pub struct StreamReader<R> {
    source: Source<R>,
    limits: Limits,
    domain: DomainHeader,
    order: Order,
    turn: Turn,
    place: Place,
    next_index: u64,
    /// The next record's header, of which a read of page data may have brought the first `header_len` bytes.
    header: [u8; RECORD_HEADER_LEN],
    header_len: usize,
    /// The words in front of the data of a PAGE_DATA record, as read.
    table: Vec<u8>,
    entries: Vec<PageEntry>,
    data_pages: usize,
}

impl<R: Read> StreamReader<R> {
    /// Reads and checks both headers.
    pub fn open(input: R, limits: Limits) -> Result<Self, StreamError> {
        let mut source = Source::new(input);
        headers::read_image_header(&mut source)
            .map_err(|fault| StreamError { place: Place::ImageHeader, fault })?;
        let place = Place::DomainHeader;
        let domain =
            headers::read_domain_header(&mut source).map_err(|fault| StreamError { place, fault })?;
        let max_entries = limits.max_entries as usize;
        Ok(StreamReader {
            source,
            limits,
            domain,
            order: Order::new(),
            turn: Turn::Record,
            place,
            next_index: 0,
            header: [0; RECORD_HEADER_LEN],
            header_len: 0,
            table: Vec::with_capacity(PAGE_DATA_HEAD_LEN + max_entries * 8),
            entries: Vec::with_capacity(max_entries),
            data_pages: 0,
        })
    }

    /// The domain header.
    pub fn domain(&self) -> &DomainHeader {
        &self.domain
    }

    /// Reads the next record; of PAGE_DATA all but the data.
    pub fn next_record(&mut self) -> Result<Record, StreamError> {
        // Whatever goes wrong from here on, the reader has stopped; success sets the turn again.
        let outcome = match mem::replace(&mut self.turn, Turn::Stopped) {
            Turn::Record => self.read_record(),
            Turn::Pages => Err(Fault::PagesDue),
            Turn::Ended => Err(Fault::Ended),
            Turn::Stopped => Err(Fault::Stopped),
        };
        outcome.map_err(|fault| StreamError { place: self.place, fault })
    }

    /// The entries of the PAGE_DATA record that was read last, strictly ascending, until the next record is read.
    pub fn entries(&self) -> &[PageEntry] {
        &self.entries
    }

    /// Reads the data of the PAGE_DATA record just returned straight into their places. `place(first, pages)` is
    /// asked once for each run of consecutive pages with data, in ascending order, and returns the memory of the
    /// run. Panics if that is not `pages * PAGE_SIZE` bytes. After an error the contents of the places are
    /// undefined.
    pub fn read_pages<'m>(
        &mut self,
        place: &mut dyn FnMut(Pfn, usize) -> &'m mut [u8],
    ) -> Result<(), StreamError> {
        self.take_pages(|reader| reader.fill_pages(place))
    }

    /// The entries of the PAGE_DATA record just returned, each with its data if it carries any.
    #[cfg(test)]
    pub fn read_copies(&mut self) -> Vec<(PageEntry, Option<Vec<u8>>)> {
        let entries = self.entries.clone();
        let mut data = vec![0; self.data_pages * PAGE_SIZE];
        let mut rest = &mut data[..];
        let run = &mut |_, pages| {
            let (run, behind) = std::mem::take(&mut rest).split_at_mut(pages * PAGE_SIZE);
            rest = behind;
            run
        };
        self.read_pages(run).unwrap();
        let mut pages = data.chunks(PAGE_SIZE).map(<[u8]>::to_vec);
        let with_data = |entry: PageEntry| (entry, entry.kind.carries_data().then(|| pages.next().unwrap()));
        entries.into_iter().map(with_data).collect()
    }

    /// Reads the data of the PAGE_DATA record just returned and drops them.
    pub fn skip_pages(&mut self) -> Result<(), StreamError> {
        self.take_pages(|reader| reader.source.skip((reader.data_pages * PAGE_SIZE) as u64))
    }

    /// Bytes taken from the input so far. Between records that may be up to 8 bytes past the last one, part of the
    /// next one's header.
    pub fn offset(&self) -> u64 {
        self.source.offset()
    }

    /// The input. After [`Record::End`] it stands at the first byte behind the stream.
    pub fn into_inner(self) -> R {
        self.source.into_inner()
    }

    fn take_pages(&mut self, take: impl FnOnce(&mut Self) -> Result<(), Fault>) -> Result<(), StreamError> {
        let outcome = match mem::replace(&mut self.turn, Turn::Stopped) {
            Turn::Pages => take(self),
            Turn::Record | Turn::Ended => Err(Fault::NoPagesDue),
            Turn::Stopped => Err(Fault::Stopped),
        };
        outcome.map_err(|fault| StreamError { place: self.place, fault })?;
        self.turn = Turn::Record;
        Ok(())
    }

    fn read_record(&mut self) -> Result<Record, Fault> {
        self.entries.clear();
        let index = self.next_index;
        let offset = self.source.offset() - self.header_len as u64;
        self.place = Place::RecordHeader { index, offset };
        self.source.fill(&mut self.header[self.header_len..])?;
        self.header_len = 0;
        self.next_index += 1;
        let kind = RecordType(u32_at(&self.header, 0));
        let len = u32_at(&self.header, 4);
        self.place = Place::Record { kind, index, offset };
        Fault::check_record_length(len)?;
        self.order.admit(kind)?;
        let record = self.read_body(kind, len)?;
        self.turn = match record {
            Record::PageData => Turn::Pages,
            Record::End => Turn::Ended,
            _ => Turn::Record,
        };
        Ok(record)
    }

    fn read_body(&mut self, kind: RecordType, len: u32) -> Result<Record, Fault> {
        match kind {
            RecordType::END => {
                require(len == 0, len, "0")?;
                Ok(Record::End)
            }
            RecordType::STATIC_DATA_END => {
                require(len == 0, len, "0")?;
                Ok(Record::StaticDataEnd)
            }
            RecordType::PAGE_DATA => {
                self.read_page_table(len)?;
                Ok(Record::PageData)
            }
            RecordType::X86_CPUID_POLICY => {
                require_whole(len, CPUID_LEAF_LEN, "a multiple of 24 and not 0")?;
                Ok(Record::CpuidPolicy(self.read_buffer(len, SMALL_BODY_MAX)?))
            }
            RecordType::X86_MSR_POLICY => {
                require_whole(len, MSR_ENTRY_LEN, "a multiple of 16 and not 0")?;
                Ok(Record::MsrPolicy(self.read_buffer(len, SMALL_BODY_MAX)?))
            }
            RecordType::X86_TSC_INFO => self.read_tsc_info(len).map(Record::TscInfo),
            RecordType::HVM_CONTEXT => {
                require(len > 0, len, "more than 0")?;
                Ok(Record::HvmContext(self.read_buffer(len, REC_LENGTH_MAX)?))
            }
            RecordType::HVM_PARAMS => self.read_hvm_params(len).map(Record::HvmParams),
            // Of all others, only optional records have been admitted.
            _ => {
                self.source.skip(len.into())?;
                self.read_padding(len)?;
                Ok(Record::Skipped { kind, len })
            }
        }
    }

    /// Reads a PAGE_DATA record up to its data and checks all of it.
    fn read_page_table(&mut self, len: u32) -> Result<(), Fault> {
        require(len >= 16 && len.is_multiple_of(8), len, "a multiple of 8 and at least 16")?;
        let body_len = len as usize;
        let max = self.limits.max_entries;
        // In words, the body is 1 + count + 512 * pages long, so that its length gives the count modulo 512. That
        // many entries are there in any case, and in most records no more: one read takes count and entries.
        let words = body_len / 8 - PAGE_DATA_HEAD_LEN / 8;
        let sure = match words % WORDS_PER_PAGE {
            0 => WORDS_PER_PAGE,
            rest => rest,
        };
        let first_read = PAGE_DATA_HEAD_LEN + sure.min(max as usize) * 8;
        self.table.resize(first_read, 0);
        self.source.fill(&mut self.table)?;
        let count = u32_at(&self.table, 0);
        Fault::check_reserved("field of the count", u32_at(&self.table, 4))?;
        if count == 0 || count > max {
            return Err(Fault::EntryCount { count, max });
        }
        let table_len = PAGE_DATA_HEAD_LEN + count as usize * 8;
        require(table_len <= body_len, len, "long enough for its entries")?;
        if table_len > first_read {
            self.table.resize(table_len, 0);
            self.source.fill(&mut self.table[first_read..])?;
        }
        self.parse_entries(count as usize)?;
        let needed = table_len as u64 + (self.data_pages * PAGE_SIZE) as u64;
        if needed != u64::from(len) {
            return Err(Fault::PageDataLength { len, count, pages: self.data_pages as u64, needed });
        }
        Ok(())
    }

    fn parse_entries(&mut self, count: usize) -> Result<(), Fault> {
        self.data_pages = 0;
        let (words, _) = self.table[PAGE_DATA_HEAD_LEN..].as_chunks();
        for (index, word) in words[..count].iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            let entry = PageEntry::from_word(word).ok_or(Fault::Entry { index, word })?;
            let pfn = entry.pfn;
            if pfn.0 >= self.limits.nr_pfns {
                return Err(Fault::PfnRange { pfn, nr_pfns: self.limits.nr_pfns });
            }
            if let Some(PageEntry { pfn: previous, .. }) = self.entries.last().copied()
                && previous >= pfn
            {
                return Err(Fault::PfnOrder { pfn, previous });
            }
            self.data_pages += usize::from(entry.kind.carries_data());
            self.entries.push(entry);
        }
        Ok(())
    }

    fn fill_pages<'m>(&mut self, place: &mut dyn FnMut(Pfn, usize) -> &'m mut [u8]) -> Result<(), Fault> {
        let mut runs = data_runs(&self.entries).peekable();
        while runs.peek().is_some() {
            let mut slices = Vec::with_capacity(self.data_pages.min(IOV_MAX - 1) + 1);
            let mut due = 0;
            for (first, pages) in runs.by_ref().take(IOV_MAX - 1) {
                let memory = place(first, pages);
                assert_eq!(memory.len(), pages * PAGE_SIZE, "memory of the {pages} pages from {first} on");
                due += memory.len();
                slices.push(IoSliceMut::new(memory));
            }
            // A record follows, be it END, so its header may come along and save a system call.
            if runs.peek().is_none() {
                slices.push(IoSliceMut::new(&mut self.header));
            }
            self.header_len = self.source.fill_vectored(&mut slices, due)?;
        }
        Ok(())
    }

    fn read_tsc_info(&mut self, len: u32) -> Result<TscInfo, Fault> {
        require(len as usize == TSC_INFO_LEN, len, "24")?;
        let mut body = [0; TSC_INFO_LEN];
        self.source.fill(&mut body)?;
        Fault::check_reserved("field at the end", u32_at(&body, 20))?;
        Ok(TscInfo {
            mode: u32_at(&body, 0),
            khz: u32_at(&body, 4),
            nsec: u64_at(&body, 8),
            incarnation: u32_at(&body, 16),
        })
    }

    fn read_hvm_params(&mut self, len: u32) -> Result<Vec<(u64, u64)>, Fault> {
        require(len as usize >= HVM_PARAMS_HEAD_LEN, len, "at least 8")?;
        let body = self.read_buffer(len, SMALL_BODY_MAX)?;
        let count = u32_at(&body, 0);
        Fault::check_reserved("field of the count", u32_at(&body, 4))?;
        let (pairs, rest) = body[HVM_PARAMS_HEAD_LEN..].as_chunks::<HVM_PARAM_LEN>();
        if pairs.len() != count as usize || !rest.is_empty() {
            return Err(Fault::ParamsLength { len, count });
        }
        Ok(pairs.iter().map(|pair| (u64_at(pair, 0), u64_at(pair, 8))).collect())
    }

    /// Reads a body that is handed on as it is.
    fn read_buffer(&mut self, len: u32, limit: u32) -> Result<Vec<u8>, Fault> {
        Fault::check_limit(len, limit)?;
        let mut body = Vec::new();
        self.source.append(&mut body, len as usize)?;
        self.read_padding(len)?;
        Ok(body)
    }

    fn read_padding(&mut self, len: u32) -> Result<(), Fault> {
        let mut padding = [0; 8];
        let padding = &mut padding[..(len.next_multiple_of(8) - len) as usize];
        self.source.fill(padding)?;
        if padding.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(Fault::Padding) }
    }
}

fn require(holds: bool, len: u32, rule: &'static str) -> Result<(), Fault> {
    if holds { Ok(()) } else { Err(Fault::Length { len, rule }) }
}

fn require_whole(len: u32, unit: usize, rule: &'static str) -> Result<(), Fault> {
    require(len > 0 && (len as usize).is_multiple_of(unit), len, rule)
}

/// The runs of consecutive pages with data: first page and number of pages.
fn data_runs(entries: &[PageEntry]) -> impl Iterator<Item = (Pfn, usize)> {
    let mut pages =
        entries.iter().filter(|entry| entry.kind.carries_data()).map(|entry| entry.pfn).peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        let mut count = 1;
        while pages.next_if_eq(&Pfn(first.0 + count as u64)).is_some() {
            count += 1;
        }
        Some((first, count))
    })
}

#[cfg(test)]
mod tests;
