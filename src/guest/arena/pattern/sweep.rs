//! Bursts that rewrite a quarter of the pages in order, and a small hot set in between.

use super::{Frame, Operation, Pace, Pattern, Region, Registers};
use crate::guest::arena::rng::Rng;
use crate::guest::arena::zipf::Zipf;

const REGION_PERCENT: u64 = 25;
const HOT_PERCENT: u64 = 1;
const PERIOD_S: u64 = 3;
const BURST: Pace = Pace::faster(4);

/// Register: operations done in this period.
const POSITION: usize = 0;

pub(super) struct Sweep {
    region: Region,
    hot: Region,
    ranks: Zipf,
    /// Operations in a period.
    period: u64,
    between: Pace,
}

impl Sweep {
    /// A rate so low that sweeping would leave no time between bursts makes the period longer instead.
    pub(super) fn new(frame: &Frame) -> Self {
        let (region, others) = frame.split(frame.percent(REGION_PERCENT));
        let hot = Region { len: frame.percent(HOT_PERCENT), ..others };
        let period = (PERIOD_S * frame.ops_per_s).max(2 * region.len);
        let between = Pace::rest(BURST, region.len, period);
        Self { region, hot, ranks: Zipf::new(hot.len), period, between }
    }
}

impl Pattern for Sweep {
    fn next(&self, registers: &mut Registers, rng: &mut Rng) -> Operation {
        let position = registers[POSITION] % self.period;
        registers[POSITION] = position + 1;
        if position < self.region.len {
            Operation { page: self.region.page(position), pace: BURST }
        } else {
            Operation { page: self.hot.page(self.ranks.sample(rng)), pace: self.between }
        }
    }
}
