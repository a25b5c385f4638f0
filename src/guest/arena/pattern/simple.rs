//! Patterns without memory: idle, uniform and storm.

use super::{Frame, Operation, Pace, Pattern, Region, Registers};
use crate::guest::arena::rng::Rng;

/// Timer pages, spread over all of RAM.
pub(super) struct Idle {
    all: Region,
}

impl Idle {
    const TIMERS: u64 = 16;

    pub(super) fn new(frame: &Frame) -> Self {
        Self { all: frame.all() }
    }
}

impl Pattern for Idle {
    fn next(&self, _: &mut Registers, rng: &mut Rng) -> Operation {
        let page = rng.below(Self::TIMERS) * self.all.len / Self::TIMERS;
        Operation { page, pace: Pace::MEAN }
    }
}

/// All pages equally often.
pub(super) struct Uniform {
    all: Region,
}

impl Uniform {
    pub(super) fn new(frame: &Frame) -> Self {
        Self { all: frame.all() }
    }
}

impl Pattern for Uniform {
    fn next(&self, _: &mut Registers, rng: &mut Rng) -> Operation {
        Operation { page: rng.below(self.all.len), pace: Pace::MEAN }
    }
}
