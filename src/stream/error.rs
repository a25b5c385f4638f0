//! What the reader found wrong, and where. Each error is one line that names the record and its place.

use super::records::{REC_LENGTH_MAX, RecordType};
use crate::page::Pfn;
use std::fmt;
use std::io;

/// A stream that cannot be read on, with the place at which reading stopped.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {fault}")]
pub struct StreamError {
    /// Where.
    pub place: Place,
    /// What is wrong.
    pub fault: Fault,
}

/// A place in a stream. Records count from 0, offsets are those of the first byte of the header or record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The image header, at offset 0.
    ImageHeader,
    /// The domain header, at offset 24.
    DomainHeader,
    /// The header of a record whose type is not known yet.
    RecordHeader {
        /// Number of the record.
        index: u64,
        /// Byte offset of the record.
        offset: u64,
    },
    /// A record.
    Record {
        /// Type of the record.
        kind: RecordType,
        /// Number of the record.
        index: u64,
        /// Byte offset of the record.
        offset: u64,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::ImageHeader => f.write_str("image header (offset 0x0)"),
            Place::DomainHeader => f.write_str("domain header (offset 0x18)"),
            Place::RecordHeader { index, offset } => {
                write!(f, "record header (record {index}, offset {offset:#x})")
            }
            Place::Record { kind, index, offset } => {
                write!(f, "{kind} (record {index}, offset {offset:#x})")
            }
        }
    }
}

/// What is wrong at a [`Place`].
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The input ended early.
    #[error("the stream ends at offset {at:#x}, {missing} bytes too early")]
    Truncated {
        /// Bytes that the input held.
        at: u64,
        /// Bytes that were still expected of what was being read.
        missing: u64,
    },
    /// The input failed.
    #[error("cannot read on: {0}")]
    Io(io::Error),
    /// The marker is not all ones.
    #[error("the marker is {0:#018x} and not all ones; this is not a libxc migration stream")]
    Marker(u64),
    /// The id is not "XENF".
    #[error("the id is {0:#010x} and not \"XENF\"; this is not a libxc migration stream")]
    Id(u32),
    /// Another version of the format.
    #[error("version {0} of the format is not supported, only version 3 is")]
    Version(u32),
    /// Written by a big-endian host.
    #[error("the stream is big-endian; only little-endian streams are supported")]
    BigEndian,
    /// A reserved field is in use.
    #[error("reserved {field} must be zero but is {value:#x}")]
    Reserved {
        /// Which field.
        field: &'static str,
        /// What it holds.
        value: u32,
    },
    /// A kind of guest that does not exist.
    #[error("guest type {0:#x} is unknown")]
    GuestType(u32),
    /// A kind of guest that the reader's profile leaves out.
    #[error("the guest is PV; only streams of HVM and PVH guests are supported")]
    PvGuest,
    /// Pages of another size.
    #[error("the page shift is {0} and not 12")]
    PageShift(u16),
    /// A body over the limit of the format or of the record type.
    #[error("a length of {len} is over the limit of {limit} bytes")]
    TooLong {
        /// Length that the record header states.
        len: u32,
        /// The most that is accepted.
        limit: u32,
    },
    /// A body whose length its type rules out.
    #[error("a length of {len} is wrong, it must be {rule}")]
    Length {
        /// Length that the record header states.
        len: u32,
        /// What it has to be.
        rule: &'static str,
    },
    /// No entries, or more than are accepted.
    #[error("{count} entries, but there must be between 1 and {max}")]
    EntryCount {
        /// Entries that the record states.
        count: u32,
        /// The most that is accepted.
        max: u32,
    },
    /// The length contradicts the entries.
    #[error("a length of {len} contradicts {count} entries, {pages} of them with data, which take {needed}")]
    PageDataLength {
        /// Length that the record header states.
        len: u32,
        /// Entries.
        count: u32,
        /// Entries that carry data.
        pages: u64,
        /// Length that they come to.
        needed: u64,
    },
    /// Reserved bits or an unknown page type in an entry.
    #[error("entry {index} is {word:#018x}, which has a reserved bit set or an unknown page type")]
    Entry {
        /// Number of the entry in the record.
        index: usize,
        /// The entry.
        word: u64,
    },
    /// A page that the guest cannot have.
    #[error("PFN {pfn} is outside the guest's {nr_pfns:#x} pages")]
    PfnRange {
        /// The page.
        pfn: Pfn,
        /// Size of the guest's page-number space.
        nr_pfns: u64,
    },
    /// Entries that do not ascend strictly.
    #[error("PFN {pfn} follows PFN {previous}, but entries must ascend")]
    PfnOrder {
        /// The page.
        pfn: Pfn,
        /// The page of the entry before.
        previous: Pfn,
    },
    /// The pairs of HVM_PARAMS do not fill the body.
    #[error("a length of {len} contradicts {count} parameters")]
    ParamsLength {
        /// Length that the record header states.
        len: u32,
        /// Pairs that the record states.
        count: u32,
    },
    /// The bytes that round a record up to a multiple of 8 are in use.
    #[error("padding must be zero")]
    Padding,
    /// A record that needs STATIC_DATA_END in front of it.
    #[error("it comes before STATIC_DATA_END")]
    BeforeStaticDataEnd,
    /// A static record, or another STATIC_DATA_END, too late.
    #[error("it comes after STATIC_DATA_END")]
    AfterStaticDataEnd,
    /// Pages after the tail has begun.
    #[error("it comes after the guest's final state, which must follow the last page")]
    AfterTail,
    /// A record that must be alone.
    #[error("it is the second of its type")]
    Repeated,
    /// A record of another profile.
    #[error("not supported: {0}")]
    Refused(&'static str),
    /// A mandatory record that is not known.
    #[error("the type is mandatory and unknown")]
    Unknown,
    /// The caller left the data of a PAGE_DATA record unread.
    #[error("the data of this record have to be read before the next record is")]
    PagesDue,
    /// The caller wants page data where there are none.
    #[error("no page data are due here")]
    NoPagesDue,
    /// The caller reads on after END.
    #[error("nothing follows this record")]
    Ended,
    /// The caller reads on after an error.
    #[error("reading stopped here at an earlier error")]
    Stopped,
}

impl Fault {
    /// Refuses a length over what the format allows any record.
    pub(super) fn check_record_length(len: u32) -> Result<(), Fault> {
        Self::check_limit(len, REC_LENGTH_MAX)
    }

    /// Refuses a length over `limit`.
    pub(super) fn check_limit(len: u32, limit: u32) -> Result<(), Fault> {
        if len > limit { Err(Fault::TooLong { len, limit }) } else { Ok(()) }
    }

    /// Refuses a reserved field that is in use.
    pub(super) fn check_reserved(field: &'static str, value: u32) -> Result<(), Fault> {
        if value != 0 { Err(Fault::Reserved { field, value }) } else { Ok(()) }
    }
}
