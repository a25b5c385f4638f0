//! Writes the trace file of [`super::format`].

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::format::{MAGIC, MAX_NAME, Round, Run, TRAILER, TraceError, VERSION};
use crate::page::{CHUNK_PAGES, PAGE_SIZE};

/// Compression level of written files: within a few percent of the highest, in a tenth of its time.
const ZSTD_LEVEL: i32 = 12;

/// Writes a trace as it is recorded. Rounds go to a file of the same name and `.part`; [`TraceWriter::finish`] makes the
/// trace of it. What is not finished leaves the `.part` behind only if the process is killed.
pub struct TraceWriter {
    path: PathBuf,
    part_path: PathBuf,
    part: BufWriter<File>,
    rounds: u64,
    payload: Vec<u8>,
    finished: bool,
}

/// What is known of a trace before its first round.
#[derive(Clone, Debug)]
pub struct Heading {
    /// What is recorded, at most 4096 bytes; longer names are cut.
    pub name: String,
    /// Nominal time between two rounds, in microseconds; at least one.
    pub period_us: u32,
    /// Wall clock at the start, in nanoseconds since 1970.
    pub start_realtime_ns: u64,
}

impl TraceWriter {
    /// Begins the trace that will be at `path`, compressed if the name ends in `.zst`.
    pub fn create(path: &Path) -> Result<Self, TraceError> {
        let mut part_path = path.as_os_str().to_owned();
        part_path.push(".part");
        let part_path = PathBuf::from(part_path);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&part_path);
        let file =
            file.map_err(|source| TraceError::Io { doing: "create", path: part_path.clone(), source })?;
        let part = BufWriter::with_capacity(1 << 20, file);
        let (rounds, payload, finished) = (0, Vec::new(), false);
        Ok(TraceWriter { path: path.to_owned(), part_path, part, rounds, payload, finished })
    }

    /// Adds a round: runs ascend and do not overlap. `round.dirty` is set here.
    pub fn round(&mut self, round: Round, runs: impl IntoIterator<Item = Run>) -> Result<(), TraceError> {
        self.payload.clear();
        let (mut at, mut dirty) = (0, 0);
        for run in runs {
            debug_assert!(run.first >= at && run.count > 0, "runs ascend and are not empty");
            push_varint(&mut self.payload, run.first - at);
            push_varint(&mut self.payload, run.count - 1);
            at = run.first + run.count;
            dirty += run.count;
        }
        let mut head = [0; 24];
        head[..8].copy_from_slice(&round.t_ns.to_le_bytes());
        for (place, value) in
            [round.scan_us, dirty, round.tracked_pages, self.payload.len() as u32].iter().enumerate()
        {
            head[8 + 4 * place..12 + 4 * place].copy_from_slice(&value.to_le_bytes());
        }
        self.rounds += 1;
        let written = self.part.write_all(&head).and_then(|()| self.part.write_all(&self.payload));
        written.map_err(|source| TraceError::Io { doing: "write", path: self.part_path.clone(), source })
    }

    /// Rounds written so far.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Completes the trace: `va_chunks` names each chunk of the id space, in the order of ids.
    pub fn finish(mut self, heading: &Heading, va_chunks: &[u64]) -> Result<(), TraceError> {
        let failed = |source| TraceError::Io { doing: "write", path: self.path.clone(), source };
        let part = self.part.get_mut().try_clone();
        self.part.flush().map_err(failed)?;
        let mut part = part.map_err(failed)?;
        part.seek(SeekFrom::Start(0)).map_err(failed)?;
        let file = BufWriter::new(File::create(&self.path).map_err(failed)?);
        let written = if self.path.extension().is_some_and(|extension| extension == "zst") {
            zstd::Encoder::new(file, ZSTD_LEVEL).and_then(|mut encoder| {
                write_all_parts(&mut encoder, heading, self.rounds, &mut part, va_chunks)?;
                encoder.finish()?.flush()
            })
        } else {
            let mut file = file;
            write_all_parts(&mut file, heading, self.rounds, &mut part, va_chunks).and_then(|()| file.flush())
        };
        written.map_err(failed)?;
        self.finished = true;
        let _ = std::fs::remove_file(&self.part_path);
        Ok(())
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.part_path);
        }
    }
}

fn write_all_parts(
    into: &mut impl Write,
    heading: &Heading,
    rounds: u64,
    part: &mut File,
    va_chunks: &[u64],
) -> io::Result<()> {
    let name = &heading.name.as_bytes()[..heading.name.len().min(MAX_NAME as usize)];
    into.write_all(&MAGIC)?;
    into.write_all(&VERSION.to_le_bytes())?;
    into.write_all(&(PAGE_SIZE as u32).to_le_bytes())?;
    into.write_all(&rounds.to_le_bytes())?;
    into.write_all(&((va_chunks.len() * CHUNK_PAGES) as u64).to_le_bytes())?;
    into.write_all(&heading.start_realtime_ns.to_le_bytes())?;
    into.write_all(&heading.period_us.to_le_bytes())?;
    into.write_all(&(name.len() as u32).to_le_bytes())?;
    into.write_all(name)?;
    io::copy(&mut BufReader::with_capacity(1 << 20, part), into)?;
    into.write_all(&TRAILER)?;
    into.write_all(&(va_chunks.len() as u32).to_le_bytes())?;
    va_chunks.iter().try_for_each(|va| into.write_all(&va.to_le_bytes()))
}

fn push_varint(into: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}
