//! What the stream's tests share: a difficult input, a small stream and a receiver of such streams.

use super::*;
use crate::page::{PAGE_SIZE, Pfn};
use std::io::{ErrorKind, IoSliceMut, Read, Result as IoResult};

pub(super) const DOMAIN: DomainHeader =
    DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };

/// Pages of the small stream's guest.
pub(super) const NR_PAGES: u64 = 4;

/// An input that returns as little as an input may, and is interrupted every now and then. A vectored read spans
/// buffers, as `readv` does.
pub(super) struct Choppy<R> {
    input: R,
    most: usize,
    state: u64,
}

impl<R: Read> Choppy<R> {
    /// Reads of at most `most` bytes.
    pub(super) fn new(input: R, most: usize, seed: u64) -> Self {
        Choppy { input, most, state: seed }
    }

    /// Bytes of the next read, or none if it is to be interrupted.
    fn next_len(&mut self) -> IoResult<usize> {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let draw = (self.state >> 33) as usize;
        if draw.is_multiple_of(4) { Err(ErrorKind::Interrupted.into()) } else { Ok(1 + draw / 4 % self.most) }
    }
}

impl<R: Read> Read for Choppy<R> {
    fn read(&mut self, buffer: &mut [u8]) -> IoResult<usize> {
        let len = self.next_len()?.min(buffer.len());
        self.input.read(&mut buffer[..len])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> IoResult<usize> {
        assert!(buffers.len() <= 1024, "the kernel refuses {} buffers", buffers.len());
        let len = self.next_len()?;
        let mut got = 0;
        for buffer in buffers {
            let part = buffer.len().min(len - got);
            let read = self.input.read(&mut buffer[..part])?;
            got += read;
            if read < buffer.len() {
                break;
            }
        }
        Ok(got)
    }
}

/// Makes, for ascending runs, the places in an image that [`StreamReader::read_pages`] asks for.
pub(super) fn places<'i>(image: &'i mut [u8]) -> impl FnMut(Pfn, usize) -> &'i mut [u8] {
    let mut rest = image;
    let mut at = 0;
    move |first, pages| {
        let (_, tail) = std::mem::take(&mut rest).split_at_mut((first.index() - at) * PAGE_SIZE);
        let (run, tail) = tail.split_at_mut(pages * PAGE_SIZE);
        rest = tail;
        at = first.index() + pages;
        run
    }
}

/// A record with a page in the slot for each (PFN, fill byte).
pub(super) fn page_data(pages: &[(u64, u8)]) -> Vec<u8> {
    let mut slot = vec![0; HEADER_ROOM + pages.len() * PAGE_SIZE];
    let mut record = PageRecord::new(&mut slot);
    for (pfn, fill) in pages {
        record.next_page().fill(*fill);
        record.commit(Pfn(*pfn));
    }
    let range = record.finish();
    slot[range].to_vec()
}

/// The small stream: its parts by name, in order, and the image that it carries.
pub(super) fn small_stream() -> (Vec<(&'static str, Vec<u8>)>, Vec<u8>) {
    let mut image = vec![0; NR_PAGES as usize * PAGE_SIZE];
    for (pfn, fill) in [(1, 1), (3, 3)] {
        image[pfn * PAGE_SIZE..][..PAGE_SIZE].fill(fill);
    }
    let context = ArenaContext::with_digests(NR_PAGES, |pfn| {
        page_digest(pfn, &image[pfn.index() * PAGE_SIZE..][..PAGE_SIZE])
    });
    let mut slot = vec![0; HEADER_ROOM];
    let mut first_pass = PageRecord::new(&mut slot);
    first_pass.push_empty(Pfn(1), PageKind::Alloc);
    first_pass.push_empty(Pfn(2), PageKind::Xtab);
    let first_pass = first_pass.finish();
    let head = headers(&DOMAIN);
    let parts = vec![
        ("image header", head[..24].to_vec()),
        ("domain header", head[24..].to_vec()),
        ("STATIC_DATA_END", record(RecordType::STATIC_DATA_END, &[])),
        ("PAGE_DATA", slot[first_pass].to_vec()),
        ("PAGE_DATA", page_data(&[(1, 1), (3, 3)])),
        ("HVM_CONTEXT", record(RecordType::HVM_CONTEXT, &context.encode(&DOMAIN))),
        ("END", end().to_vec()),
    ];
    (parts, image)
}

/// What a receiver of the embedded guest ends up with: the domain header and the image.
pub(super) type Received = (DomainHeader, Vec<u8>);

/// Receives a stream as the embedded guest's destination does: it insists on a context whose digests the image
/// agrees with.
pub(super) fn receive(input: impl Read) -> Result<Received, Box<dyn std::error::Error>> {
    let mut reader = StreamReader::open(input, Limits::new(NR_PAGES))?;
    let mut image = vec![0; NR_PAGES as usize * PAGE_SIZE];
    let mut context = None;
    loop {
        match reader.next_record()? {
            Record::PageData => reader.read_pages(&mut places(&mut image))?,
            Record::HvmContext(body) => {
                context = Some(ArenaContext::decode(&body, reader.domain(), NR_PAGES)?);
            }
            Record::End => break,
            _ => {}
        }
    }
    let context = context.ok_or("no context")?;
    let found = context.mismatches(|pfn| page_digest(pfn, &image[pfn.index() * PAGE_SIZE..][..PAGE_SIZE]));
    if context.nr_pages != NR_PAGES || found.ok_or("no digests")?.count != 0 {
        return Err("the image is not the source's".into());
    }
    Ok((*reader.domain(), image))
}
