//! The libxc migration stream, version 3: what the source writes and the destination reads, whether the guest is
//! a Xen domain or the embedded one. Pure: it lays bytes out in memory that it is given and reads from any
//! [`Read`](std::io::Read); it opens nothing, and it starts no thread.
//!
//! * [`records`]: the words of the format: record and page types, the domain header.
//! * [`writer`]: lays records out in place, so that page data are copied once at most.
//! * [`reader`]: the strict reader. A byte that the format does not allow is an error, and each count is bounded
//!   before memory is taken for it.
//! * [`image`]: a guest as a stream leaves it, to be compared with another.
//! * [`error`]: what the reader found wrong, and where.
//! * [`arena_context`]: what the embedded guest puts where a Xen guest has its HVM context.
//!
//! The layout is that of Xen's `docs/specs/libxc-migration-stream.pandoc`. The profile is that of HVM and PVH guests
//! in a plain stream: static records, STATIC_DATA_END, PAGE_DATA in any number, the tail, END.
//!
//! ```
//! use pagecast::page::{PAGE_SIZE, Pfn};
//! use pagecast::stream::{DomainHeader, GuestType, HEADER_ROOM, Limits, PageRecord, Record, StreamReader};
//! use pagecast::stream::{end, stream_head};
//!
//! let domain = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };
//! let mut slot = vec![0; HEADER_ROOM + PAGE_SIZE];
//! let mut pages = PageRecord::new(&mut slot);
//! pages.next_page().fill(7);
//! pages.commit(Pfn(3));
//! let range = pages.finish();
//! let stream = [&stream_head(&domain)[..], &slot[range], &end()].concat();
//!
//! let mut reader = StreamReader::open(&stream[..], Limits::new(8))?;
//! assert_eq!(reader.next_record()?, Record::StaticDataEnd);
//! assert_eq!(reader.next_record()?, Record::PageData);
//! let mut page = [0; PAGE_SIZE];
//! let mut memory = Some(&mut page[..]);
//! reader.read_pages(&mut |first, pages| {
//!     assert_eq!((first, pages), (Pfn(3), 1));
//!     memory.take().expect("one run")
//! })?;
//! assert_eq!(reader.next_record()?, Record::End);
//! assert_eq!(page, [7; PAGE_SIZE]);
//! # Ok::<(), pagecast::stream::StreamError>(())
//! ```

pub mod arena_context;
pub mod error;
mod headers;
pub mod image;
mod order;
pub mod reader;
pub mod records;
mod saved_context;
mod source;
pub mod writer;

#[cfg(test)]
mod corruption_tests;
#[cfg(test)]
mod round_trip_tests;
#[cfg(test)]
mod sample;

pub use arena_context::{ArenaContext, ArenaContextError, Mismatches, page_digest};
pub use error::{Fault, Place, StreamError};
pub use image::{Image, unwrap_xl};
pub use reader::{Limits, Record, StreamReader};
pub use records::{DomainHeader, GuestType, PageEntry, PageKind, REC_LENGTH_MAX, RecordType, TscInfo};
pub use writer::{
    HEADER_ROOM, MAX_ENTRIES, PageRecord, end, headers, hvm_params, record, stream_head, tsc_info,
};
