//! The bare loop: touches what a tick of the forecast touches, in the same order, and computes nothing.

use crate::guest::{NR_PAGES, PAGES_PER_SAMPLE};
use pagecast::page::Pfn;
use pagecast::page_set::{PageSet, for_each_place};
use pagecast::sys::huge_pages;
use pagecast::sys::simd::{Work, at_best};

type Line = [u64; 8];
const NR_CHUNKS: usize = NR_PAGES as usize / 512;
/// As `LOOKS` of the forecast: written pages that a plan looks at, about.
const LOOKS: u64 = 1 << 18;

/// Memory laid out as the forecast lays out its own; `model_bytes` are those of a page's model.
pub struct Bare {
    model_bytes: usize,
    ages: Vec<u16>,
    models: Vec<u8>,
    /// Two lines a chunk.
    states: Vec<[Line; 2]>,
    dirty: Vec<Line>,
    counts: Vec<u16>,
    pending: Vec<Line>,
    plans: Vec<[i16; 4]>,
    turn: u64,
}

struct Touch<'a> {
    bare: &'a mut Bare,
    log: &'a [u64],
    looks: bool,
}

impl Work for Touch<'_> {
    type Output = u64;

    #[inline(always)]
    fn run(self) -> u64 {
        self.bare.load(self.log);
        self.bare.update();
        self.bare.unite();
        self.bare.plan(self.looks)
    }
}

fn table<T: Clone>(len: usize, value: T) -> Vec<T> {
    let mut table = Vec::with_capacity(len);
    huge_pages::ask_for(&table);
    table.resize(len, value);
    table
}

impl Bare {
    pub fn new(model_bytes: usize) -> Self {
        Bare {
            model_bytes,
            ages: table(NR_PAGES as usize, 0),
            models: table(NR_PAGES as usize * model_bytes, 0),
            states: table(NR_CHUNKS, [[0; 8]; 2]),
            dirty: table(NR_CHUNKS, [0; 8]),
            counts: table(NR_CHUNKS, 0),
            pending: table(NR_CHUNKS, [0; 8]),
            plans: table(NR_CHUNKS, [0; 4]),
            turn: 0,
        }
    }

    /// A sample was taken in before the first tick.
    pub fn note_written(&mut self, dirty: &PageSet) {
        for chunk in dirty.occupied_chunks() {
            let words = dirty.chunk_words(chunk);
            self.states[chunk][0].iter_mut().zip(words).for_each(|(written, word)| *written |= word);
        }
    }

    /// So many pages are pending when the first tick begins.
    pub fn set_pending(&mut self, pending: &PageSet) {
        (0..NR_CHUNKS).for_each(|chunk| self.pending[chunk] = *pending.chunk_words(chunk));
    }

    /// A tick in which `log` is dirty and `sent` is handed out. With `looks`, written pages are looked at for the plan.
    pub fn tick(&mut self, log: &[u64], looks: bool, sent: &[Pfn]) -> u64 {
        let seen = at_best(Touch { bare: self, log, looks });
        assert!(sent.len() <= PAGES_PER_SAMPLE);
        for pfn in sent {
            self.pending[pfn.chunk()][pfn.in_chunk() / 64] &= !(1 << (pfn.0 % 64));
        }
        seen
    }

    #[inline(always)]
    fn load(&mut self, log: &[u64]) {
        for (line, count) in self.dirty.iter_mut().zip(&mut self.counts) {
            if *count > 0 {
                *line = [0; 8];
                *count = 0;
            }
        }
        for ((line, count), words) in self.dirty.iter_mut().zip(&mut self.counts).zip(log.as_chunks().0) {
            if *words != [0; 8] {
                *line = *words;
                *count = 1;
            }
        }
    }

    #[inline(always)]
    fn update(&mut self) {
        for chunk in 0..NR_CHUNKS {
            if self.counts[chunk] == 0 {
                continue;
            }
            let state = &mut self.states[chunk];
            state[0].iter_mut().zip(&self.dirty[chunk]).for_each(|(written, word)| *written |= word);
            state[1][0] += 1;
            for_each_place(&self.dirty[chunk], |place| {
                self.ages[chunk * 512 + place] += 1;
                self.models[(chunk * 512 + place) * self.model_bytes] ^= 1;
            });
        }
    }

    #[inline(always)]
    fn unite(&mut self) {
        for chunk in 0..NR_CHUNKS {
            if self.counts[chunk] > 0 {
                let words = self.pending[chunk].iter_mut().zip(&self.dirty[chunk]);
                words.for_each(|(pending, dirty)| *pending |= dirty);
            }
        }
    }

    #[inline(always)]
    fn plan(&mut self, looks: bool) -> u64 {
        let (mut seen, mut written_pages) = (0, 0);
        for chunk in 0..NR_CHUNKS {
            let state = &self.states[chunk];
            let pages = self.pending[chunk].iter().zip(&state[0]);
            let written: u32 = pages.map(|(pending, written)| (pending & written).count_ones()).sum();
            self.plans[chunk] = [written as i16, state[1][0] as i16, 0, 0];
            written_pages += u64::from(written);
        }
        if !looks {
            return written_pages;
        }
        let parts = written_pages.div_ceil(LOOKS).max(1);
        let turn = self.turn % parts;
        self.turn += 1;
        for chunk in (0..NR_CHUNKS).filter(|chunk| *chunk as u64 % parts == turn) {
            let mut words = self.pending[chunk];
            words.iter_mut().zip(&self.states[chunk][0]).for_each(|(pending, written)| *pending &= written);
            for_each_place(&words, |place| {
                seen += u64::from(self.ages[chunk * 512 + place]);
                seen += u64::from(self.models[(chunk * 512 + place) * self.model_bytes]);
            });
        }
        seen
    }
}
