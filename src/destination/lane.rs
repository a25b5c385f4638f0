//! One lane of a migration: reads its stream straight into guest memory.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::path::Path;

use super::ReceiveError;
use crate::page_set::PageSet;
use crate::stream::error::{Fault, StreamError};
use crate::stream::reader::{Limits, Record, StreamReader};
use crate::stream::records::{DomainHeader, GuestType, PageKind};
use crate::sys::guest_memory::LaneWriter;
use crate::sys::socket;

/// A file for what is read from a connection.
pub struct Capture {
    file: BufWriter<File>,
    path: String,
}

impl Capture {
    /// Opens the file, which is made if there is none. What is in it stays until a stream begins.
    ///
    /// # Errors
    ///
    /// [`ReceiveError::Capture`]: it cannot be opened to be written.
    pub fn open(path: &Path) -> Result<Self, ReceiveError> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let path = path.display().to_string();
        match file {
            Ok(file) => Ok(Capture { file: BufWriter::new(file), path }),
            Err(source) => Err(ReceiveError::Capture { path, source }),
        }
    }

    /// Empties the file.
    fn begin(&mut self) -> Result<(), ReceiveError> {
        let file = self.file.get_ref();
        // A pipe or a device has no length.
        let emptied = file.metadata().and_then(|kind| if kind.is_file() { file.set_len(0) } else { Ok(()) });
        emptied.map_err(|source| ReceiveError::Capture { path: self.path.clone(), source })
    }
}

/// A connection, with a copy of what was read from it in a file if wanted.
pub struct Input {
    connection: TcpStream,
    capture: Option<Capture>,
}

impl Input {
    /// Reads from `connection` and writes all of it to `capture`, in place of what was there.
    ///
    /// # Errors
    ///
    /// [`ReceiveError::Capture`]: the file cannot be emptied.
    pub fn new(connection: TcpStream, mut capture: Option<Capture>) -> Result<Self, ReceiveError> {
        capture.as_mut().map_or(Ok(()), Capture::begin)?;
        Ok(Input { connection, capture })
    }
}

impl Read for Input {
    /// Reads what is not pages, and first acknowledges the pages read before it.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        // A refusal costs the other side time and nothing else.
        let _ = socket::acknowledge(&self.connection);
        let count = self.connection.read(into)?;
        if let Some(capture) = &mut self.capture {
            capture.file.write_all(&into[..count])?;
        }
        Ok(count)
    }

    fn read_vectored(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let count = self.connection.read_vectored(into)?;
        if let Some(capture) = &mut self.capture {
            let mut left = count;
            for part in into {
                let here = left.min(part.len());
                capture.file.write_all(&part[..here])?;
                left -= here;
            }
        }
        Ok(count)
    }
}

/// What it means that the stream of `lane` cannot be read on.
fn failed(lane: u16) -> impl Fn(StreamError) -> ReceiveError {
    move |source| match source.fault {
        Fault::Truncated { .. } => ReceiveError::SourceGone { lane, place: source.place },
        Fault::Io(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::TimedOut) => {
            ReceiveError::SourceGone { lane, place: source.place }
        }
        fault => ReceiveError::Stream { lane, source: StreamError { fault, place: source.place } },
    }
}

/// What a lane brought.
pub struct Delivered {
    /// The domain header.
    pub domain: DomainHeader,
    /// Pages named at least once.
    pub received: PageSet,
    /// Page entries in all.
    pub entries: u64,
    /// The body of the HVM_CONTEXT record, if there was one.
    pub context: Option<Vec<u8>>,
}

/// One lane's reading.
pub struct LaneReader<'m> {
    /// Where its pages go.
    pub memory: LaneWriter<'m>,
    /// Which lane this is.
    pub lane: u16,
}

impl LaneReader<'_> {
    /// Reads a stream to its END and not a byte further.
    pub fn read(mut self, input: Input) -> Result<Delivered, ReceiveError> {
        let lane = self.lane;
        let nr_pages = self.memory.nr_pages();
        let mut reader = StreamReader::open(input, Limits::new(nr_pages)).map_err(failed(lane))?;
        let domain = *reader.domain();
        if domain.guest != GuestType::X86Hvm {
            return Err(self.refuse("the stream is of a PV guest; an embedded guest's is HVM"));
        }
        let mut delivered =
            Delivered { domain, received: PageSet::empty(nr_pages), entries: 0, context: None };
        loop {
            match reader.next_record().map_err(failed(lane))? {
                Record::PageData => self.take_pages(&mut reader, &mut delivered)?,
                Record::HvmContext(_) if self.lane != 0 => {
                    return Err(self.refuse("a context, which belongs to lane 0"));
                }
                Record::HvmContext(body) => delivered.context = Some(body),
                Record::StaticDataEnd | Record::Skipped { .. } => {}
                Record::End => break,
                _ => return Err(self.refuse("a record that no embedded guest sends")),
            }
        }
        if let Some(capture) = &mut reader.into_inner().capture {
            capture
                .file
                .flush()
                .map_err(|error| self.refuse(&format!("cannot write the captured stream: {error}")))?;
        }
        Ok(delivered)
    }

    fn take_pages(
        &mut self,
        reader: &mut StreamReader<Input>,
        delivered: &mut Delivered,
    ) -> Result<(), ReceiveError> {
        for entry in reader.entries() {
            if !self.memory.has(entry.pfn) {
                return Err(self.refuse(&format!("page {} belongs to another lane", entry.pfn)));
            }
            match entry.kind {
                PageKind::NoTab => {}
                // Between two pagecasts this means a page of zeroes (session `Welcome`). Memory is zero until
                // something was received into it.
                PageKind::Alloc if delivered.received.contains(entry.pfn) => {
                    self.memory.runs().take(entry.pfn, 1).fill(0);
                }
                PageKind::Alloc => {}
                other => {
                    return Err(self.refuse(&format!("page {} is of type {other:?}", entry.pfn)));
                }
            }
            delivered.received.insert(entry.pfn);
        }
        delivered.entries += reader.entries().len() as u64;
        let mut runs = self.memory.runs();
        reader.read_pages(&mut |first, pages| runs.take(first, pages)).map_err(failed(self.lane))
    }

    fn refuse(&self, reason: &str) -> ReceiveError {
        ReceiveError::Content { lane: self.lane, reason: reason.to_owned() }
    }
}
