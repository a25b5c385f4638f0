//! Writes the trace file of [`super::format`].

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use super::format::{MAGIC, MAX_NAME, Round, Run, TRAILER, TraceError, VERSION};
use crate::page::{CHUNK_PAGES, PAGE_SIZE};
use crate::sys::output_file::OutputFile;

/// Compression level of written files: within a few percent of the highest, in a tenth of its time.
const ZSTD_LEVEL: i32 = 12;
/// Rounds go to the file when they are so many bytes.
const BATCH: usize = 1 << 20;
/// Where the counts of rounds and of pages and the time of the start stand in the header.
const COUNTS_AT: u64 = 16;
/// 32 GiB that a guest may grow by between two batches, in chunks.
const SPARE_CHUNKS: u64 = 16 << 10;

/// Writes a trace as it is recorded, uncompressed, to a file of the same name and `.part`, which [`TraceWriter::finish`] makes
/// the trace of. If that fails, or the process is killed, it stays; it goes if the writer is dropped before.
pub struct TraceWriter {
    path: PathBuf,
    part_path: PathBuf,
    /// Locked.
    part: File,
    /// Bytes of header and rounds that are in the file, and how many rounds.
    len: u64,
    rounds: u64,
    /// Rounds that are not, and how many.
    batch: Vec<u8>,
    batched: u64,
    /// Chunks of the id space so far.
    nr_chunks: u64,
    start_realtime_ns: u64,
    settled: bool,
}

/// What is known of a trace before its first round.
#[derive(Clone, Debug)]
pub struct Heading {
    /// What is recorded, at most 4096 bytes; longer names are cut.
    pub name: String,
    /// Nominal time between two rounds, in microseconds; at least one.
    pub period_us: u32,
}

impl TraceWriter {
    /// Begins the trace that will be at `path`, compressed if the name ends in `.zst`.
    ///
    /// # Errors
    ///
    /// Nothing can be written there, or the part file is another recorder's, or holds a recording that was kept, or is none
    /// of ours.
    pub fn create(path: &Path, heading: &Heading) -> Result<Self, TraceError> {
        let failed = |source| TraceError::Io { doing: "write", path: path.to_owned(), source };
        if let Ok(there) = fs::metadata(path) {
            OutputFile::check(path).map_err(failed)?;
            if !there.is_file() {
                return Err(failed(io::Error::other("it is a device or a pipe; name a file")));
            }
        }
        // A link stays one.
        let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut part_path = path.as_os_str().to_owned();
        part_path.push(".part");
        let part_path = PathBuf::from(part_path);
        let part = open_locked(&part_path).map_err(|source| TraceError::Io {
            doing: "create",
            path: part_path.clone(),
            source,
        })?;
        let mut writer = TraceWriter {
            path: path.to_owned(),
            part_path,
            part,
            len: 0,
            rounds: 0,
            batch: header(heading),
            batched: 0,
            nr_chunks: 0,
            start_realtime_ns: 0,
            settled: false,
        };
        writer.flush()?;
        Ok(writer)
    }

    /// The recording starts now.
    pub fn start(&mut self) {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.start_realtime_ns = since_1970.as_nanos() as u64;
    }

    /// Where the trace will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a round: runs ascend and do not overlap. `round.dirty` is set here.
    ///
    /// # Errors
    ///
    /// Those of [`TraceWriter::flush`], which is called every now and then.
    pub fn round(&mut self, round: Round, runs: impl IntoIterator<Item = Run>) -> Result<(), TraceError> {
        let head_at = self.batch.len();
        self.batch.resize(head_at + 24, 0);
        let (mut at, mut dirty) = (0, 0);
        for run in runs {
            debug_assert!(run.first >= at && run.count > 0, "runs ascend and are not empty");
            push_varint(&mut self.batch, run.first - at);
            push_varint(&mut self.batch, run.count - 1);
            at = run.first + run.count;
            dirty += run.count;
        }
        let payload_len = (self.batch.len() - head_at - 24) as u32;
        let head = &mut self.batch[head_at..head_at + 24];
        head[..8].copy_from_slice(&round.t_ns.to_le_bytes());
        for (place, value) in [round.scan_us, dirty, round.tracked_pages, payload_len].iter().enumerate() {
            head[8 + 4 * place..12 + 4 * place].copy_from_slice(&value.to_le_bytes());
        }
        self.batched += 1;
        self.nr_chunks = u64::from(round.tracked_pages).div_ceil(CHUNK_PAGES as u64);
        if self.batch.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    /// Rounds of the trace so far; after an error, those that were written before.
    pub fn rounds(&self) -> u64 {
        self.rounds + self.batched
    }

    /// Completes the trace: `va_chunks` names each chunk of the id space, in the order of ids.
    ///
    /// # Errors
    ///
    /// [`TraceError::Kept`]: the trace is whole, and in the part file because it could not be put where it belongs.
    /// [`TraceError::Io`]: its last rounds or its end cannot be written, and it is no trace; whoever wants one of the rounds
    /// before flushes first.
    pub fn finish(mut self, va_chunks: &[u64]) -> Result<(), TraceError> {
        self.flush()?;
        // From here on the file stays, wherever it stands.
        self.settled = true;
        self.write_end(va_chunks).map_err(|error| self.failed(error))?;
        let placed = if self.path.extension().is_some_and(|extension| extension == "zst") {
            self.compress().and_then(|()| fs::remove_file(&self.part_path))
        } else {
            fs::rename(&self.part_path, &self.path)
        };
        placed.map_err(|source| TraceError::Kept {
            path: self.path.clone(),
            source,
            kept: self.part_path.clone(),
        })
    }

    /// The trailer, and what the header lacks.
    fn write_end(&self, va_chunks: &[u64]) -> io::Result<()> {
        let mut trailer = TRAILER.to_vec();
        trailer.extend((va_chunks.len() as u32).to_le_bytes());
        va_chunks.iter().for_each(|va| trailer.extend(va.to_le_bytes()));
        let mut counts = self.rounds.to_le_bytes().to_vec();
        counts.extend(((va_chunks.len() * CHUNK_PAGES) as u64).to_le_bytes());
        counts.extend(self.start_realtime_ns.to_le_bytes());
        self.part.write_all_at(&trailer, self.len)?;
        self.part.write_all_at(&counts, COUNTS_AT)
    }

    fn compress(&self) -> io::Result<()> {
        let file = OutputFile::create(&self.path)?;
        let mut encoder = zstd::Encoder::new(BufWriter::new(file), ZSTD_LEVEL)?;
        io::copy(&mut BufReader::with_capacity(BATCH, File::open(&self.part_path)?), &mut encoder)?;
        encoder.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?.commit()
    }

    /// Writes down the rounds so far.
    ///
    /// # Errors
    ///
    /// They cannot be written, and are given up; those written before can still be made a trace of.
    pub fn flush(&mut self) -> Result<(), TraceError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let (bytes, rounds) = (self.batch.len() as u64, std::mem::take(&mut self.batched));
        let written = self.part.write_all_at(&self.batch, self.len);
        self.batch.clear();
        if let Err(error) = written.and_then(|()| self.reserve_end(self.len + bytes)) {
            // What there is of it makes room for the end of the trace.
            let _ = self.part.set_len(self.len);
            let _ = self.reserve_end(self.len);
            return Err(self.failed(error));
        }
        self.len += bytes;
        self.rounds += rounds;
        Ok(())
    }

    /// Makes sure that there will be room for the trailer behind `len` bytes, where the file system can.
    fn reserve_end(&self, len: u64) -> io::Result<()> {
        // Some more: chunks may come before the next time.
        let room = (TRAILER.len() + 4) as u64 + 8 * (self.nr_chunks + SPARE_CHUNKS);
        match fallocate(&self.part, FallocateFlags::KEEP_SIZE, len, room) {
            Err(Errno::NOSPC | Errno::DQUOT) => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> TraceError {
        TraceError::Io { doing: "write", path: self.part_path.clone(), source }
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        if !self.settled {
            let _ = fs::remove_file(&self.part_path);
        }
    }
}

/// An empty file that nobody else records into.
fn open_locked(path: &Path) -> io::Result<File> {
    loop {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other(
                    "another recording writes to it; choose another name with --out",
                ));
            }
            locked => locked?,
        }
        // The one that had it may just have made a trace of it, or removed it.
        let is_there =
            fs::metadata(path).is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino()));
        if is_there {
            refuse_to_lose(&file)?;
            file.set_len(0)?;
            return Ok(file);
        }
    }
}

/// Errs if the file is anything but what a killed recorder leaves.
fn refuse_to_lose(part: &File) -> io::Result<()> {
    let mut head = [0; COUNTS_AT as usize + 8];
    let what = if part.metadata()?.len() == 0 {
        return Ok(());
    } else if part.read_exact_at(&mut head, 0).is_err() || head[..MAGIC.len()] != MAGIC {
        "it is there and is no recording"
    } else if head[COUNTS_AT as usize..] != [0; 8] {
        "it is a recording that was kept"
    } else {
        return Ok(());
    };
    Err(io::Error::other(format!("{what}; move it away or choose another name with --out")))
}

/// With 0 for what is not known yet: the counts of rounds and of pages, and the time of the start.
fn header(heading: &Heading) -> Vec<u8> {
    let name = &heading.name.as_bytes()[..heading.name.len().min(MAX_NAME as usize)];
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((PAGE_SIZE as u32).to_le_bytes());
    header.extend([0; 24]);
    header.extend(heading.period_us.to_le_bytes());
    header.extend((name.len() as u32).to_le_bytes());
    header.extend(name);
    header
}

fn push_varint(into: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::super::format::Trace;
    use super::*;

    fn heading() -> Heading {
        Heading { name: "a test".to_owned(), period_us: 50_000 }
    }

    fn add(writer: &mut TraceWriter, number: u64) -> Result<(), TraceError> {
        let round = Round { t_ns: number, scan_us: 0, dirty: 0, tracked_pages: 512 };
        writer.round(round, [Run { first: number as u32, count: 2 }])
    }

    #[test]
    fn a_trace_that_cannot_be_put_where_it_belongs_is_kept_whole() {
        for name in ["t.pct", "t.pct.zst"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join(name);
            let mut writer = TraceWriter::create(&path, &heading()).unwrap();
            (0..5).for_each(|number| add(&mut writer, number).unwrap());
            fs::create_dir(&path).unwrap();
            let error = writer.finish(&[7]).unwrap_err();
            let TraceError::Kept { kept, .. } = &error else { panic!("{error}") };
            assert!(error.to_string().contains(name) && !error.to_string().contains('\n'), "{error}");
            let trace = Trace::open(kept).unwrap();
            assert_eq!((trace.name.as_str(), trace.rounds().len(), trace.nr_pages()), ("a test", 5, 512));
            // And it is not lost to whoever tries again.
            fs::remove_dir(&path).unwrap();
            let refusal = TraceWriter::create(&path, &heading()).err().unwrap().to_string();
            assert!(refusal.contains("a recording that was kept"), "{refusal}");
            assert_eq!(Trace::open(kept).unwrap().rounds().len(), 5);
        }
    }

    #[test]
    fn after_a_failed_write_the_rounds_before_it_make_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.pct");
        let mut writer = TraceWriter::create(&path, &heading()).unwrap();
        (0..5).for_each(|number| add(&mut writer, number).unwrap());
        writer.flush().unwrap();
        let whole = std::mem::replace(&mut writer.part, File::open(path.with_extension("pct.part")).unwrap());
        add(&mut writer, 5).unwrap();
        assert!(writer.flush().is_err(), "a file that is open to be read only");
        writer.part = whole;
        assert_eq!(writer.rounds(), 5);
        writer.finish(&[7]).unwrap();
        assert_eq!(Trace::open(&path).unwrap().rounds().len(), 5);
    }

    #[test]
    fn what_is_there_is_replaced_by_a_whole_trace_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.pct");
        fs::write(&path, "before").unwrap();
        let mut writer = TraceWriter::create(&path, &heading()).unwrap();
        add(&mut writer, 0).unwrap();
        let second = TraceWriter::create(&path, &heading()).err().expect("only one records into a file");
        assert!(second.to_string().contains("another recording"), "{second}");
        drop(writer);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert!(!path.with_extension("pct.part").exists());
        let mut writer = TraceWriter::create(&path, &heading()).unwrap();
        add(&mut writer, 0).unwrap();
        writer.finish(&[7]).unwrap();
        assert_eq!(Trace::open(&path).unwrap().rounds().len(), 1);
    }

    #[test]
    fn a_place_where_no_trace_can_be_is_refused_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |path: &Path| TraceWriter::create(path, &heading()).err().unwrap().to_string();
        assert!(refusal(folder.path()).contains("is a directory"));
        assert!(refusal(Path::new("/dev/null")).contains("name a file"));
        assert!(refusal(&folder.path().join("none/t.pct")).contains("none/t.pct.part"));
        for theirs in ["a note", "a note that is as long as the header of a trace"] {
            fs::write(folder.path().join("t.pct.part"), theirs).unwrap();
            assert!(refusal(&folder.path().join("t.pct")).contains("is no recording"));
            assert_eq!(fs::read_to_string(folder.path().join("t.pct.part")).unwrap(), theirs);
        }
    }

    #[test]
    fn what_a_killed_recorder_left_is_written_over_and_a_link_stays_one() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("t.pct"), folder.path().join("l.pct"));
        let mut writer = TraceWriter::create(&path, &heading()).unwrap();
        add(&mut writer, 0).unwrap();
        writer.flush().unwrap();
        // As if it had been killed.
        writer.settled = true;
        drop(writer);
        fs::write(&path, "before").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut writer = TraceWriter::create(&link, &heading()).unwrap();
        (0..3).for_each(|number| add(&mut writer, number).unwrap());
        writer.finish(&[7]).unwrap();
        assert_eq!(Trace::open(&path).unwrap().rounds().len(), 3);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
