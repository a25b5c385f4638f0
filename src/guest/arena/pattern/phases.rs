//! A guest that changes its ways every few seconds, and the part of its memory with them.

use super::{Frame, KeyValue, Operation, Pace, Pattern, Region, Registers};
use crate::guest::arena::rng::Rng;

/// Share of the pages that a key-value phase uses.
const KEY_VALUE_PERCENT: u64 = 25;
/// Share of the pages that a hot-set phase uses.
const HOT_PERCENT: u64 = 5;
/// Pages that a quiet phase uses.
const QUIET_PAGES: u64 = 16;
/// How much slower a quiet phase is than the others.
const QUIET_TIMES: u32 = 50;
/// A phase takes from this many milliseconds to twice as many, at the rate it has.
const SHORTEST_MS: u64 = 2000;

/// Register: which of [`Mode::ALL`] the phase is.
pub(super) const MODE: usize = 0;
/// Register: operations left in this phase.
const LEFT: usize = 1;
/// Register: the first page of the part of memory that the phase uses.
const START: usize = 2;
/// Register: the sequential phase's front.
const FRONT: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    KeyValue,
    Sequential,
    Hot,
    Quiet,
}

impl Mode {
    const ALL: [Self; 4] = [Self::KeyValue, Self::Sequential, Self::Hot, Self::Quiet];

    fn of(registers: &Registers) -> Self {
        Self::ALL[registers[MODE] as usize % Self::ALL.len()]
    }
}

pub(super) struct Phases {
    all: Region,
    ops_per_s: u64,
    key_value: KeyValue,
    hot_pages: u64,
}

impl Phases {
    pub(super) fn new(frame: &Frame) -> Self {
        let requests = Region { len: frame.percent(KEY_VALUE_PERCENT), ..frame.all() };
        Self {
            all: frame.all(),
            ops_per_s: frame.ops_per_s,
            key_value: KeyValue::new(requests, frame.seed),
            hot_pages: frame.percent(HOT_PERCENT),
        }
    }

    /// Another mode than the last, in another part of memory.
    fn begin(&self, registers: &mut Registers, rng: &mut Rng) {
        let modes = Mode::ALL.len() as u64;
        registers[MODE] = (registers[MODE] % modes + 1 + rng.below(modes - 1)) % modes;
        let slower = if Mode::of(registers) == Mode::Quiet { u64::from(QUIET_TIMES) } else { 1 };
        let ms = SHORTEST_MS + rng.below(SHORTEST_MS + 1);
        registers[LEFT] = (self.ops_per_s * ms / (1000 * slower)).max(1);
        registers[START] = rng.below(self.all.len);
        registers[FRONT] = 0;
    }
}

impl Pattern for Phases {
    fn next(&self, registers: &mut Registers, rng: &mut Rng) -> Operation {
        if registers[LEFT] == 0 {
            self.begin(registers, rng);
        }
        registers[LEFT] -= 1;
        let (place, pace) = match Mode::of(registers) {
            Mode::KeyValue => (self.key_value.place(rng), Pace::MEAN),
            Mode::Sequential => {
                let front = registers[FRONT] % self.all.len;
                registers[FRONT] = front + 1;
                (front, Pace::MEAN)
            }
            Mode::Hot => (rng.below(self.hot_pages), Pace::MEAN),
            Mode::Quiet => (rng.below(QUIET_PAGES), Pace::slower(QUIET_TIMES)),
        };
        Operation { page: self.all.page(registers[START] % self.all.len + place), pace }
    }
}
