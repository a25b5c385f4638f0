//! A generational garbage collector.
//!
//! An allocation front goes once through the young generation; every eighth write meanwhile is an update of a
//! random old page, as a program's pointers into the old generation are. Then a collection copies the
//! survivors, faster, to the front of the old generation, and the young generation is filled anew.

use super::{Frame, Operation, Pace, Pattern, Region, Registers};
use crate::guest::arena::rng::Rng;

const YOUNG_PERCENT: u64 = 30;
const SURVIVOR_PERCENT: u64 = 10;
/// One of this many writes of the program is an update of an old page.
const UPDATE_EVERY: u64 = 8;
const COLLECTION: Pace = Pace::faster(4);

/// Register: operations done in this cycle.
const POSITION: usize = 0;
/// Register: where the old generation goes on.
const OLD_FRONT: usize = 1;

pub(super) struct Gc {
    young: Region,
    old: Region,
    /// Operations of a cycle before the collection.
    program: u64,
    /// Operations in a cycle.
    cycle: u64,
    program_pace: Pace,
}

impl Gc {
    pub(super) fn new(frame: &Frame) -> Self {
        let (young, old) = frame.split(frame.percent(YOUNG_PERCENT));
        let survivors = (young.len * SURVIVOR_PERCENT / 100).max(1);
        // So many that the allocations among them fill the young generation.
        let program = young.len + young.len / (UPDATE_EVERY - 1);
        let cycle = program + survivors;
        Self { young, old, program, cycle, program_pace: Pace::rest(COLLECTION, survivors, cycle) }
    }
}

impl Pattern for Gc {
    fn next(&self, registers: &mut Registers, rng: &mut Rng) -> Operation {
        let position = registers[POSITION] % self.cycle;
        registers[POSITION] = position + 1;
        if position >= self.program {
            let front = registers[OLD_FRONT] % self.old.len;
            registers[OLD_FRONT] = front + 1;
            Operation { page: self.old.page(front), pace: COLLECTION }
        } else if position % UPDATE_EVERY == UPDATE_EVERY - 1 {
            Operation { page: self.old.page(rng.below(self.old.len)), pace: self.program_pace }
        } else {
            let allocated = position - position / UPDATE_EVERY;
            Operation { page: self.young.page(allocated), pace: self.program_pace }
        }
    }
}
