//! The machine: boot, take-over, and one operation.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cpu::Cpu;
use super::fault::Fault;
use super::layout::{CPU, Layout};
use super::owned::{self, Label};
use super::pattern::{self, Pace, Pattern};
use super::ram::{Page, Ram};
use super::rng::Rng;
use super::table;
use super::workload::Spec;
use crate::page::Pfn;

/// Operations between two background checks of one more page, whatever it is.
const SCRUB_EVERY_OPS: u64 = 16;

/// Why there is no machine in this RAM.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The region does not end at a page boundary.
    #[error("RAM of {bytes} bytes is not a whole number of 4096-byte pages")]
    PartPage {
        /// Length of the region.
        bytes: usize,
    },
    /// The region is too small for the workloads' regions.
    #[error("RAM of {pages} pages is too small: the embedded guest needs at least {min_pages} pages")]
    TooSmall {
        /// Pages there are.
        pages: u64,
        /// Pages there have to be.
        min_pages: u64,
    },
    /// Too little would be left to write.
    #[error("zero share of {percent} % is too large: choose at most {max_percent} %")]
    ZeroShare {
        /// The share asked for.
        percent: u8,
        /// The largest possible.
        max_percent: u8,
    },
    /// The RAM is not an image of a machine.
    #[error("page 0 does not begin with PCARENA1: this is not the RAM of an embedded guest")]
    NotAMachine,
    /// The image was made by another version.
    #[error(
        "the image has format version {found}, this pagecast runs version {expected}: use the same pagecast"
    )]
    Version {
        /// Version of the image.
        found: u64,
        /// Version of this program.
        expected: u64,
    },
    /// The CPU page is torn, or something has been written over it.
    #[error("page 0, the CPU page, is torn or damaged: its checksum is wrong")]
    CpuPageDamaged,
    /// The CPU page holds a value that no machine stores.
    #[error("page 0, the CPU page, holds an impossible {field}: {value}")]
    CpuField {
        /// What the value is for.
        field: &'static str,
        /// The value.
        value: u64,
    },
    /// Part of the image is missing, or there is too much.
    #[error("the image is that of a machine with {stored} pages, but this RAM has {actual}")]
    Size {
        /// Pages according to the CPU page.
        stored: u64,
        /// Pages there are.
        actual: u64,
    },
}

/// What a machine has done and found, over its whole life and on every host it has run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Operations done.
    pub ops: u64,
    /// Pages written; each owned page once at boot, then one for each operation.
    pub writes: u64,
    /// Pages checked.
    pub checks: u64,
    /// Errors found.
    pub errors: u64,
    /// The first few errors.
    pub first_errors: Vec<Fault>,
    /// Time that the guest was told has passed.
    pub guest_time: Duration,
    /// The longest that operations were due and none ran.
    pub longest_silence: Duration,
    /// How often the machine has been taken over from an image.
    pub resumes: u64,
}

impl From<&Cpu> for Stats {
    fn from(cpu: &Cpu) -> Self {
        Self {
            ops: cpu.ops,
            writes: cpu.writes,
            checks: cpu.checks,
            errors: cpu.errors,
            first_errors: cpu.first_faults.iter().flatten().copied().collect(),
            guest_time: Duration::from_nanos(cpu.guest_time_ns),
            longest_silence: Duration::from_nanos(cpu.longest_silence_ns),
            resumes: cpu.resumes,
        }
    }
}

/// Reads the statistics of a machine from outside, without disturbing it. While the machine runs, this fails
/// now and then with [`MachineError::CpuPageDamaged`], because the CPU page was just being written: try again.
pub fn read_stats(ram: &[u8]) -> Result<Stats, MachineError> {
    let cpu_page: &Page = ram.first_chunk().ok_or(MachineError::PartPage { bytes: ram.len() })?;
    Ok(Stats::from(&Cpu::load(cpu_page)?))
}

/// A machine that runs in a RAM it borrows. See the [module documentation](super) for what is in there.
pub struct Machine<'a> {
    pub(super) ram: Ram<'a>,
    pub(super) cpu: Cpu,
    pub(super) layout: Layout,
    pattern: Box<dyn Pattern>,
}

impl<'a> Machine<'a> {
    /// Makes a machine and writes all its owned pages once. The RAM must be all zero: zero pages are not
    /// touched, so that they need not exist in a fresh mapping, and one that is not zero will be an error.
    pub fn boot(ram: &'a mut [u8], spec: &Spec) -> Result<Self, MachineError> {
        let ram = Ram::new(ram)?;
        let cpu = Cpu::new(ram.nr_pages(), spec);
        let mut machine = Self::assemble(ram, cpu)?;
        for table in machine.layout.tables() {
            table::format(machine.ram.page_mut(table), table);
        }
        for at in 0..machine.layout.nr_owned() {
            machine.write(machine.layout.owned(at));
        }
        machine.store_cpu();
        Ok(machine)
    }

    /// Takes over a RAM image and goes on after the last operation of the machine in it. Checks no more than
    /// the CPU page, because this is downtime; see [`Machine::check_all`].
    pub fn resume(ram: &'a mut [u8]) -> Result<Self, MachineError> {
        let ram = Ram::new(ram)?;
        let actual = ram.nr_pages();
        if actual == 0 {
            return Err(MachineError::NotAMachine);
        }
        let cpu = Cpu::load(ram.page(CPU))?;
        if cpu.nr_pages != actual {
            return Err(MachineError::Size { stored: cpu.nr_pages, actual });
        }
        let mut machine = Self::assemble(ram, cpu)?;
        machine.cpu.resumes += 1;
        machine.store_cpu();
        Ok(machine)
    }

    /// Derives what is not in RAM from what is.
    fn assemble(ram: Ram<'a>, cpu: Cpu) -> Result<Self, MachineError> {
        let layout = Layout::new(cpu.nr_pages, cpu.spec.zero_share_percent, cpu.spec.seed)?;
        let pattern = pattern::build(&cpu.spec, layout.nr_owned());
        Ok(Self { ram, cpu, layout, pattern })
    }

    /// Does one operation, due or not.
    pub fn step(&mut self) {
        self.operate();
        self.store_cpu();
    }

    /// What the machine was booted with; the rate is always there.
    pub fn spec(&self) -> &Spec {
        &self.cpu.spec
    }

    /// Pages that the machine writes; the others, apart from page 0 and the sequence tables, are zero pages.
    pub fn owned_pages(&self) -> u64 {
        self.layout.nr_owned()
    }

    /// What the machine has done and found so far.
    pub fn stats(&self) -> Stats {
        Stats::from(&self.cpu)
    }

    /// Checks and writes one page, and now and then checks another. The caller stores the CPU page.
    pub(super) fn operate(&mut self) -> Pace {
        let mut rng = Rng::at(self.cpu.rng);
        let operation = self.pattern.next(&mut self.cpu.registers, &mut rng);
        self.cpu.rng = rng.state();

        let pfn = self.layout.owned(operation.page);
        self.check(pfn);
        self.write(pfn);
        self.cpu.ops += 1;
        if self.cpu.ops.is_multiple_of(SCRUB_EVERY_OPS) {
            self.scrub();
        }
        operation.pace
    }

    pub(super) fn store_cpu(&mut self) {
        self.cpu.store(self.ram.page_mut(CPU));
    }

    /// Writes an owned page's next version, and counts it in its table.
    fn write(&mut self, pfn: Pfn) {
        let entry = self.layout.entry(pfn);
        let seq = u64::from(table::count(self.ram.page(entry.table), entry.slot)) + 1;
        owned::write(self.ram.page_mut(pfn), self.cpu.spec.seed, Label { pfn, seq });
        table::increment(self.ram.page_mut(entry.table), entry.slot);
        self.cpu.writes += 1;
    }

    /// Checks the page at the scrub cursor, which goes round all pages but the CPU's.
    fn scrub(&mut self) {
        let pfn = Pfn(self.cpu.scrub_cursor);
        self.check(pfn);
        let next = pfn.0 + 1;
        self.cpu.scrub_cursor = if next < self.layout.nr_pages() { next } else { 1 };
    }
}
