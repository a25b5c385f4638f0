//! The trace file, `.pct`, and the same compressed with zstd, `.pct.zst`. Little-endian, packed:
//!
//! ```text
//! header   "PCTRACE\0", u32 version 1, u32 page_size 4096, u64 n_rounds, u64 n_pages, u64 start_realtime_ns,
//!          u32 period_us, u32 name_len, name
//! rounds   u64 t_ns, u32 scan_us, u32 n_dirty, u32 n_tracked_pages, u32 payload_len, payload:
//!          pairs of LEB128 varints (gap, length - 1); a run of pages starts at the end of the one before + gap
//! trailer  "CHNK", u32 n_chunks, u64 va_chunk[n_chunks]
//! ```
//!
//! Page ids are handed out by 2 MiB chunk of address space when it is first seen: `id = chunk * 512 + (va >> 12) % 512`
//! and `va_chunk[chunk] = va >> 21`; `n_pages = 512 n_chunks`. Round 0 is everything populated at the start; the set of a
//! round is what was written, or newly populated, since the round before.
//!
//! The reader takes files from strangers: it checks every length and every id, and allocates for what is there and not
//! for what a header claims.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::page::{CHUNK_PAGES, PAGE_SIZE};

pub(super) const MAGIC: [u8; 8] = *b"PCTRACE\0";
pub(super) const VERSION: u32 = 1;
pub(super) const TRAILER: [u8; 4] = *b"CHNK";
/// First bytes of a zstd frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// 16 TiB of guest. Ids are kept in 32 bits.
const MAX_PAGES: u64 = u32::MAX as u64;
pub(super) const MAX_NAME: u32 = 4096;
/// A run is at most two varints of five bytes.
const MAX_RUN_BYTES: u64 = 10;

/// Why a trace cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A system call failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the call said.
        source: io::Error,
    },
    /// A trace was written and could not be put where it belongs.
    #[error("cannot write {}: {source}; the recording is whole, uncompressed, in {}", path.display(), kept.display())]
    Kept {
        /// Where it belongs.
        path: PathBuf,
        /// What the call said.
        source: io::Error,
        /// Where it is.
        kept: PathBuf,
    },
    /// The file is no trace, or a damaged one.
    #[error("{} is not a valid trace: {what}; record it again or get a fresh copy", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
}

/// Pages `first .. first + count`, written in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page's id.
    pub first: u32,
    /// How many, at least one.
    pub count: u32,
}

/// What a round's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// When its scan began, in nanoseconds since the start of the recording.
    pub t_ns: u64,
    /// How long listing, registration and scan took, in microseconds.
    pub scan_us: u32,
    /// Pages in its set.
    pub dirty: u32,
    /// Size of the id space so far.
    pub tracked_pages: u32,
}

/// A trace in memory: 8 bytes a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What was recorded, by the recorder's words.
    pub name: String,
    /// Nominal time between two rounds, in microseconds; at least one.
    pub period_us: u32,
    /// Wall clock at the start, in nanoseconds since 1970.
    pub start_realtime_ns: u64,
    /// For each chunk the address of its first page, shifted right by 21.
    pub va_chunks: Vec<u64>,
    rounds: Vec<Round>,
    /// Where the runs of each round end.
    ends: Vec<usize>,
    runs: Vec<Run>,
}

impl Trace {
    /// Reads a whole trace, compressed or not.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let failed = |source| TraceError::Io { doing: "open", path: path.to_owned(), source };
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(failed)?);
        let mut start = [0; 4];
        let compressed = file.read_exact(&mut start).is_ok() && start == ZSTD_MAGIC;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let parsed = if compressed {
            let decoder = zstd::Decoder::with_buffer(file).map_err(failed)?;
            Self::parse(BufReader::with_capacity(1 << 20, decoder))
        } else {
            Self::parse(file)
        };
        parsed.map_err(|fault| match fault {
            Fault::Io(source) => TraceError::Io { doing: "read", path: path.to_owned(), source },
            Fault::Malformed(what) => TraceError::Malformed { path: path.to_owned(), what },
        })
    }

    /// Whether there is a file that can be opened; what it holds is not looked at.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn look_for(path: &Path) -> Result<(), TraceError> {
        let failed = |source| TraceError::Io { doing: "open", path: path.to_owned(), source };
        File::open(path).map(drop).map_err(failed)
    }

    /// A trace out of rounds that are known: the start of each in nanoseconds, and its pages as ascending runs.
    #[cfg(test)]
    pub(super) fn from_rounds(
        name: &str,
        period_us: u32,
        va_chunks: Vec<u64>,
        rounds: impl Iterator<Item = (u64, Vec<Run>)>,
    ) -> Self {
        let mut trace = Trace {
            name: name.to_owned(),
            period_us,
            start_realtime_ns: 0,
            va_chunks,
            rounds: Vec::new(),
            ends: Vec::new(),
            runs: Vec::new(),
        };
        for (t_ns, runs) in rounds {
            let dirty = runs.iter().map(|run| run.count).sum();
            trace.rounds.push(Round { t_ns, scan_us: 0, dirty, tracked_pages: 0 });
            trace.runs.extend(runs);
            trace.ends.push(trace.runs.len());
        }
        trace
    }

    fn parse(input: impl Read) -> Result<Self, Fault> {
        let mut input = Input { input, at: 0 };
        if input.array::<8>()? != MAGIC {
            return Err(Fault::new("it does not start with PCTRACE"));
        }
        let (version, page_size) = (input.u32()?, input.u32()?);
        if version != VERSION || page_size as usize != PAGE_SIZE {
            return Err(Fault::new(format!(
                "version {version} with pages of {page_size} bytes; known are version {VERSION} and {PAGE_SIZE}"
            )));
        }
        let (n_rounds, n_pages) = (input.u64()?, input.u64()?);
        let start_realtime_ns = input.u64()?;
        let (period_us, name_len) = (input.u32()?, input.u32()?);
        if n_pages == 0 || n_pages > MAX_PAGES || !n_pages.is_multiple_of(CHUNK_PAGES as u64) {
            return Err(Fault::new(format!("{n_pages} pages, which is no sensible number of 2 MiB chunks")));
        }
        if n_rounds == 0 || period_us == 0 || name_len > MAX_NAME {
            return Err(Fault::new(format!(
                "{n_rounds} rounds of {period_us} us under a name of {name_len} bytes"
            )));
        }
        let name = String::from_utf8_lossy(&input.bytes(name_len.into())?).into_owned();
        let mut trace = Trace {
            name,
            period_us,
            start_realtime_ns,
            va_chunks: Vec::new(),
            rounds: Vec::new(),
            ends: Vec::new(),
            runs: Vec::new(),
        };
        for number in 0..n_rounds {
            trace.parse_round(&mut input, n_pages).map_err(|fault| fault.in_round(number))?;
        }
        if input.array::<4>()? != TRAILER {
            return Err(Fault::new("the table of chunks does not follow the last round"));
        }
        let n_chunks = u64::from(input.u32()?);
        if n_chunks * CHUNK_PAGES as u64 != n_pages {
            return Err(Fault::new(format!("{n_chunks} chunks for {n_pages} pages")));
        }
        let table = input.bytes(8 * n_chunks)?;
        trace.va_chunks = table.as_chunks().0.iter().map(|va| u64::from_le_bytes(*va)).collect();
        if input.input.read(&mut [0])? != 0 {
            return Err(Fault::new("something follows its end"));
        }
        Ok(trace)
    }

    fn parse_round(&mut self, input: &mut Input<impl Read>, n_pages: u64) -> Result<(), Fault> {
        let round = Round {
            t_ns: input.u64()?,
            scan_us: input.u32()?,
            dirty: input.u32()?,
            tracked_pages: input.u32()?,
        };
        let payload_len = u64::from(input.u32()?);
        if self.rounds.last().is_some_and(|last| last.t_ns > round.t_ns) {
            return Err(Fault::new("it is earlier than the round before"));
        }
        if payload_len > MAX_RUN_BYTES * u64::from(round.dirty) {
            return Err(Fault::new(format!("{payload_len} bytes for {} pages", round.dirty)));
        }
        let payload = input.bytes(payload_len)?;
        let (mut rest, mut at, mut dirty) = (&payload[..], 0, 0);
        while !rest.is_empty() {
            let (gap, less_one) = (varint(&mut rest)?, varint(&mut rest)?);
            let (first, count) = (at + gap, less_one + 1);
            at = first + count;
            dirty += count;
            if at > n_pages {
                return Err(Fault::new(format!("page {} of {n_pages}", at - 1)));
            }
            self.runs.push(Run { first: first as u32, count: count as u32 });
        }
        if dirty != u64::from(round.dirty) {
            return Err(Fault::new(format!("{dirty} pages where its header says {}", round.dirty)));
        }
        self.rounds.push(round);
        self.ends.push(self.runs.len());
        Ok(())
    }

    /// Size of the page-id space.
    pub fn nr_pages(&self) -> u64 {
        (self.va_chunks.len() * CHUNK_PAGES) as u64
    }

    /// The headers of the rounds; round 0 is everything populated at the start.
    pub fn rounds(&self) -> &[Round] {
        &self.rounds
    }

    /// The pages of a round, ascending.
    pub fn runs(&self, round: usize) -> &[Run] {
        let start = if round == 0 { 0 } else { self.ends[round - 1] };
        &self.runs[start..self.ends[round]]
    }

    /// Rounds that were not taken in time, by the clock of those that were: `rounds() * period` is less than the time that it
    /// took to record.
    pub fn rounds_missed(&self) -> u64 {
        let (Some(first), Some(last)) = (self.rounds.first(), self.rounds.last()) else { return 0 };
        let period_ns = u64::from(self.period_us) * 1000;
        let periods = last.t_ns.saturating_sub(first.t_ns).saturating_add(period_ns / 2) / period_ns;
        periods.saturating_sub(self.rounds.len() as u64 - 1)
    }

    /// Seconds between two rounds.
    pub fn period_s(&self) -> f64 {
        f64::from(self.period_us) / 1e6
    }

    /// The same trace with chunk `old` renamed to `place_of(old)`, a permutation of `0..nr_chunks`: ids by first use
    /// say something about the future that no guest tells.
    ///
    /// Panics if `place_of` is no permutation.
    pub fn with_chunks_renamed(&self, place_of: impl Fn(usize) -> usize) -> Self {
        let n_chunks = self.va_chunks.len();
        let places: Vec<usize> = (0..n_chunks).map(place_of).collect();
        let mut va_chunks = vec![None; n_chunks];
        for (old, place) in places.iter().enumerate() {
            assert!(va_chunks[*place].replace(self.va_chunks[old]).is_none(), "place {place} is taken twice");
        }
        let mut renamed = Trace {
            name: self.name.clone(),
            period_us: self.period_us,
            start_realtime_ns: self.start_realtime_ns,
            va_chunks: va_chunks.into_iter().flatten().collect(),
            rounds: self.rounds.clone(),
            ends: Vec::with_capacity(self.ends.len()),
            runs: Vec::with_capacity(self.runs.len()),
        };
        let mut pieces = Vec::new();
        for round in 0..self.rounds.len() {
            pieces.clear();
            pieces.extend(self.runs(round).iter().flat_map(|run| by_chunk(*run)).map(|piece| {
                let (chunk, in_chunk) =
                    (piece.first as usize / CHUNK_PAGES, piece.first % CHUNK_PAGES as u32);
                Run { first: (places[chunk] * CHUNK_PAGES) as u32 + in_chunk, ..piece }
            }));
            pieces.sort_unstable_by_key(|piece| piece.first);
            let start = renamed.runs.len();
            for piece in &pieces {
                match renamed.runs[start..].last_mut() {
                    Some(last) if last.first + last.count == piece.first => last.count += piece.count,
                    _ => renamed.runs.push(*piece),
                }
            }
            renamed.ends.push(renamed.runs.len());
        }
        renamed
    }
}

/// A run cut at the borders of chunks.
fn by_chunk(run: Run) -> impl Iterator<Item = Run> {
    let end = run.first + run.count;
    let mut at = run.first;
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let first = at;
        at = end.min(first - first % CHUNK_PAGES as u32 + CHUNK_PAGES as u32);
        Some(Run { first, count: at - first })
    })
}

/// What can go wrong while a trace is read, before the file's name is known.
enum Fault {
    Io(io::Error),
    Malformed(String),
}

impl Fault {
    fn new(what: impl Into<String>) -> Self {
        Fault::Malformed(what.into())
    }

    fn in_round(self, number: u64) -> Self {
        match self {
            Fault::Malformed(what) => Fault::Malformed(format!("round {number}: {what}")),
            other => other,
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Fault::new("it ends too early"),
            _ => Fault::Io(error),
        }
    }
}

struct Input<R> {
    input: R,
    at: u64,
}

impl<R: Read> Input<R> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    /// `len` bytes; memory is taken as they arrive.
    fn bytes(&mut self, len: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = Vec::new();
        self.input.by_ref().take(len).read_to_end(&mut bytes)?;
        self.at += bytes.len() as u64;
        if (bytes.len() as u64) < len {
            return Err(Fault::new(format!("it ends too early, after {} bytes", self.at)));
        }
        Ok(bytes)
    }
}

/// Takes an unsigned LEB128 number below 2^32 off the front.
fn varint(rest: &mut &[u8]) -> Result<u64, Fault> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let (byte, after) = rest.split_first().ok_or_else(|| Fault::new("its last run is cut short"))?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if value <= MAX_PAGES { Ok(value) } else { Err(Fault::new("a number beyond 32 bits")) };
        }
    }
    Err(Fault::new("a number of more than five bytes"))
}

/// The runs of a sorted list of page numbers without duplicates.
pub fn runs_of(pages: impl IntoIterator<Item = u32>) -> impl Iterator<Item = Run> {
    let mut pages = pages.into_iter().peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        let mut count = 1;
        while pages.next_if(|page| *page == first + count).is_some() {
            count += 1;
        }
        Some(Run { first, count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::writer::{Heading, TraceWriter};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary folder")
    }

    fn write(path: &Path, n_chunks: usize, rounds: &[BTreeSet<u32>]) {
        let heading = Heading { name: "a test".to_owned(), period_us: 50_000 };
        let mut writer = TraceWriter::create(path, &heading).unwrap();
        for (number, pages) in rounds.iter().enumerate() {
            let round = Round { t_ns: number as u64 * 50, scan_us: 7, dirty: 0, tracked_pages: 512 };
            writer.round(round, runs_of(pages.iter().copied())).unwrap();
        }
        let va_chunks: Vec<u64> = (0..n_chunks as u64).map(|chunk| 1000 + 3 * chunk).collect();
        writer.finish(&va_chunks).unwrap();
    }

    fn pages_of(trace: &Trace, round: usize) -> BTreeSet<u32> {
        trace.runs(round).iter().flat_map(|run| run.first..run.first + run.count).collect()
    }

    fn rounds(n_chunks: u32) -> impl Strategy<Value = Vec<BTreeSet<u32>>> {
        let pages = proptest::collection::btree_set(0..n_chunks * 512, 0..300);
        proptest::collection::vec(pages, 1..8)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn what_is_written_is_read_back(rounds in rounds(5), compressed: bool) {
            let folder = folder();
            let path = folder.path().join(if compressed { "t.pct.zst" } else { "t.pct" });
            write(&path, 5, &rounds);
            let trace = Trace::open(&path).unwrap();
            prop_assert_eq!((trace.nr_pages(), trace.rounds().len()), (5 * 512, rounds.len()));
            prop_assert_eq!((trace.name.as_str(), trace.period_us, trace.va_chunks[4]), ("a test", 50_000, 1012));
            for (number, pages) in rounds.iter().enumerate() {
                prop_assert_eq!(&pages_of(&trace, number), pages);
                prop_assert_eq!(trace.rounds()[number].dirty as usize, pages.len());
            }
            prop_assert!(!path.with_extension("zst.part").exists() && !path.with_extension("pct.part").exists());
        }

        #[test]
        fn renaming_chunks_moves_every_page_with_its_chunk(rounds in rounds(7), step in 1usize..7) {
            let folder = folder();
            let path = folder.path().join("t.pct");
            write(&path, 7, &rounds);
            let trace = Trace::open(&path).unwrap();
            let renamed = trace.with_chunks_renamed(|chunk| (chunk * step + 3) % 7);
            for (number, pages) in rounds.iter().enumerate() {
                let moved = |page: &u32| ((*page as usize / 512 * step + 3) % 7 * 512) as u32 + page % 512;
                let expected: BTreeSet<u32> = pages.iter().map(moved).collect();
                prop_assert_eq!(pages_of(&renamed, number), expected);
                prop_assert!(renamed.runs(number).windows(2).all(|two| two[0].first + two[0].count < two[1].first));
            }
            prop_assert_eq!(renamed.va_chunks[(step + 3) % 7], trace.va_chunks[1]);
        }

        #[test]
        fn a_damaged_file_is_refused_or_read_as_something_valid(
            rounds in rounds(3), at in 0usize..2000, byte: u8, cut in 0usize..3000,
        ) {
            let folder = folder();
            let path = folder.path().join("t.pct");
            write(&path, 3, &rounds);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(trace) = Trace::parse(&bytes[..]) {
                for round in 0..trace.rounds().len() {
                    let pages = pages_of(&trace, round);
                    prop_assert_eq!(pages.len(), trace.rounds()[round].dirty as usize);
                    prop_assert!(pages.iter().all(|page| u64::from(*page) < trace.nr_pages()));
                }
            }
            write(&path, 3, &rounds);
            let bytes = std::fs::read(&path).unwrap();
            prop_assert!(Trace::parse(&bytes[..cut % bytes.len()]).is_err());
            prop_assert!(Trace::parse(&[&bytes[..], &[0]].concat()[..]).is_err());
        }
    }

    #[test]
    fn rounds_that_are_missing_are_seen_by_the_clock() {
        let folder = folder();
        let path = folder.path().join("t.pct");
        for (times_ms, missed) in [(&[5, 56, 104][..], 0), (&[5, 56, 205], 2), (&[5], 0)] {
            let heading = Heading { name: "a test".to_owned(), period_us: 50_000 };
            let mut writer = TraceWriter::create(&path, &heading).unwrap();
            for t_ms in times_ms {
                let round = Round { t_ns: t_ms * 1_000_000, scan_us: 0, dirty: 0, tracked_pages: 512 };
                writer.round(round, []).unwrap();
            }
            writer.finish(&[7]).unwrap();
            assert_eq!(Trace::open(&path).unwrap().rounds_missed(), missed, "{times_ms:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let folder = folder();
        let path = folder.path().join("t.pct");
        write(&path, 1, &[BTreeSet::from([3]), BTreeSet::from([511])]);
        let good = std::fs::read(&path).unwrap();
        let second = 48 + 6 + 24 + 2;
        for (at, byte, says) in [
            (0, b'X', "does not start with PCTRACE"),
            (8, 9, "version 9"),
            (24, 1, "no sensible number"),
            (second, 0x10, ""),
            (second + 12, 2, "round 1: 1 pages where its header says 2"),
            (second + 24 + 1, 0x04, "round 1: page 639 of 512"),
        ] {
            let mut bad = good.clone();
            bad[at] = byte;
            std::fs::write(&path, bad).unwrap();
            match Trace::open(&path) {
                Ok(_) => assert_eq!(says, "", "a later time is no fault"),
                Err(error) => {
                    let said = error.to_string();
                    assert!(said.contains(says) && !said.contains('\n'), "{said}");
                }
            }
        }
    }
}
