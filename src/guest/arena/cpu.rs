//! The CPU page: all of the machine's state that is not in a data page or a sequence table.
//!
//! [`Cpu`] is the page decoded. The machine works on that and stores it after every operation, so the page in
//! RAM is whole and current whenever no operation is under way. The operation number is its version.

use xxhash_rust::xxh3::xxh3_64;

use super::fault::{Fault, FaultKind};
use super::machine::MachineError;
use super::pattern::{REGISTERS, Registers};
use super::ram::{Page, set_word, word};
use super::rng::{Purpose, Rng};
use super::workload::{Spec, Workload};
use crate::page::{PAGE_SIZE, Pfn, is_zero};

/// The page's first word, so that it reads so in a dump.
const MAGIC: u64 = u64::from_le_bytes(*b"PCARENA1");

/// Version of everything in RAM, the workloads' operations included.
const VERSION: u64 = 1;

/// How many errors are kept in full; the others are only counted.
const FIRST_FAULTS: usize = 4;
const FAULT_WORDS: usize = 3;

/// The page in words: magic, checksum of the words after it, scalars, registers, first errors, zeros.
const CHECKSUM_AT: usize = 1;
const SCALARS_AT: usize = 2;
const SCALARS: usize = 17;
const REGISTERS_AT: usize = SCALARS_AT + SCALARS;
const FAULTS_AT: usize = REGISTERS_AT + REGISTERS;
const WORDS: usize = FAULTS_AT + FIRST_FAULTS * FAULT_WORDS;
const WORD: usize = size_of::<u64>();

const _: () = assert!(WORDS * WORD <= PAGE_SIZE);

/// The CPU page, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) nr_pages: u64,
    /// What the machine was booted with, its rate resolved.
    pub(super) spec: Spec,
    /// State of the random numbers that operations use.
    pub(super) rng: u64,
    pub(super) registers: Registers,
    /// The program counter: operations done.
    pub(super) ops: u64,
    /// Pages written, at boot and by operations: the sum of all table entries.
    pub(super) writes: u64,
    /// Pages checked.
    pub(super) checks: u64,
    /// Errors found, and the first of them.
    pub(super) errors: u64,
    pub(super) first_faults: [Option<Fault>; FIRST_FAULTS],
    /// The page that is checked next in the background.
    pub(super) scrub_cursor: u64,
    /// The time that the guest has been told has passed.
    pub(super) guest_time_ns: u64,
    /// Guest time at which the next operation is due.
    pub(super) next_due_ns: u64,
    /// Guest time of the last operation.
    pub(super) last_op_ns: u64,
    pub(super) longest_silence_ns: u64,
    /// How often the machine has been taken over from an image.
    pub(super) resumes: u64,
}

impl Cpu {
    /// The state before the first operation.
    pub(super) fn new(nr_pages: u64, spec: &Spec) -> Self {
        Self {
            nr_pages,
            spec: Spec { rate: Some(spec.effective_rate()), ..spec.clone() },
            rng: Rng::new(spec.seed, Purpose::Operations).state(),
            registers: [0; REGISTERS],
            ops: 0,
            writes: 0,
            checks: 0,
            errors: 0,
            first_faults: [None; FIRST_FAULTS],
            scrub_cursor: 1,
            guest_time_ns: 0,
            next_due_ns: 0,
            last_op_ns: 0,
            longest_silence_ns: 0,
            resumes: 0,
        }
    }

    /// Counts an error and keeps it if it is one of the first.
    pub(super) fn note(&mut self, kind: FaultKind, pfn: Pfn) -> Fault {
        let fault = Fault { kind, pfn, op: self.ops };
        self.errors += 1;
        if let Some(free) = self.first_faults.iter_mut().find(|kept| kept.is_none()) {
            *free = Some(fault);
        }
        fault
    }

    /// Writes the state to its page. What lies beyond it stays as it is: zero.
    pub(super) fn store(&self, page: &mut Page) {
        let mut words = [0; WORDS];
        words[0] = MAGIC;
        words[SCALARS_AT..REGISTERS_AT].copy_from_slice(&self.scalars());
        words[REGISTERS_AT..FAULTS_AT].copy_from_slice(&self.registers);
        for (at, fault) in self.first_faults.iter().flatten().enumerate() {
            let from = FAULTS_AT + at * FAULT_WORDS;
            words[from..from + FAULT_WORDS].copy_from_slice(&[fault.kind.id(), fault.pfn.0, fault.op]);
        }
        for (bytes, word) in page.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        set_word(page, CHECKSUM_AT, checksum(page));
    }

    /// Reads a CPU page that may be anything.
    pub(super) fn load(page: &Page) -> Result<Self, MachineError> {
        if word(page, 0) != MAGIC {
            return Err(MachineError::NotAMachine);
        }
        if word(page, CHECKSUM_AT) != checksum(page) || !is_zero(&page[WORDS * WORD..]) {
            return Err(MachineError::CpuPageDamaged);
        }
        let scalars = std::array::from_fn(|at| word(page, SCALARS_AT + at));
        let registers = std::array::from_fn(|at| word(page, REGISTERS_AT + at));
        let mut first_faults = [None; FIRST_FAULTS];
        for (at, fault) in first_faults.iter_mut().enumerate() {
            *fault = load_fault(std::array::from_fn(|part| word(page, FAULTS_AT + at * FAULT_WORDS + part)))?;
        }
        Self::from_parts(scalars, registers, first_faults)
    }

    /// In the order of [`Cpu::from_parts`].
    fn scalars(&self) -> [u64; SCALARS] {
        [
            VERSION,
            self.nr_pages,
            self.spec.workload.id(),
            self.spec.seed,
            u64::from(self.spec.effective_rate()),
            u64::from(self.spec.zero_share_percent),
            self.rng,
            self.ops,
            self.writes,
            self.checks,
            self.errors,
            self.scrub_cursor,
            self.guest_time_ns,
            self.next_due_ns,
            self.last_op_ns,
            self.longest_silence_ns,
            self.resumes,
        ]
    }

    fn from_parts(
        scalars: [u64; SCALARS],
        registers: Registers,
        first_faults: [Option<Fault>; FIRST_FAULTS],
    ) -> Result<Self, MachineError> {
        let [
            version,
            nr_pages,
            workload,
            seed,
            rate,
            zero_share,
            rng,
            ops,
            writes,
            checks,
            errors,
            scrub_cursor,
            guest_time_ns,
            next_due_ns,
            last_op_ns,
            longest_silence_ns,
            resumes,
        ] = scalars;
        let impossible = |field, value| MachineError::CpuField { field, value };
        if version != VERSION {
            return Err(MachineError::Version { found: version, expected: VERSION });
        }
        if !(1..nr_pages).contains(&scrub_cursor) {
            return Err(impossible("scrub cursor", scrub_cursor));
        }
        let spec = Spec {
            workload: Workload::from_id(workload).ok_or(impossible("workload", workload))?,
            seed,
            rate: Some(rate.try_into().map_err(|_| impossible("rate", rate))?),
            zero_share_percent: zero_share.try_into().map_err(|_| impossible("zero share", zero_share))?,
        };
        Ok(Self {
            nr_pages,
            spec,
            rng,
            registers,
            ops,
            writes,
            checks,
            errors,
            first_faults,
            scrub_cursor,
            guest_time_ns,
            next_due_ns,
            last_op_ns,
            longest_silence_ns,
            resumes,
        })
    }
}

fn load_fault([kind, pfn, op]: [u64; FAULT_WORDS]) -> Result<Option<Fault>, MachineError> {
    match (kind, FaultKind::from_id(kind)) {
        (0, _) => Ok(None),
        (_, Some(kind)) => Ok(Some(Fault { kind, pfn: Pfn(pfn), op })),
        (_, None) => Err(MachineError::CpuField { field: "error kind", value: kind }),
    }
}

fn checksum(page: &Page) -> u64 {
    xxh3_64(&page[(CHECKSUM_AT + 1) * WORD..WORDS * WORD])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored() -> (Cpu, Page) {
        let spec = Spec { rate: Some(9), ..Spec::new(Workload::Gc, 5) };
        let mut cpu = Cpu::new(2000, &spec);
        cpu.registers = [1, 2, 3, 4];
        (cpu.ops, cpu.writes, cpu.resumes) = (70, 80, 2);
        for pfn in 10..16 {
            cpu.note(FaultKind::Stale, Pfn(pfn));
        }
        let mut page = [0; PAGE_SIZE];
        cpu.store(&mut page);
        (cpu, page)
    }

    #[test]
    fn the_state_survives_its_page() {
        let (cpu, page) = stored();
        assert_eq!(Cpu::load(&page).unwrap(), cpu);
        assert_eq!(cpu.errors, 6);
        assert_eq!(cpu.first_faults.map(|fault| fault.unwrap().pfn.0), [10, 11, 12, 13]);
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let (_, mut page) = stored();
        for bit in 0..PAGE_SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(Cpu::load(&page).is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn impossible_fields_under_a_right_checksum_are_refused() {
        let (_, page) = stored();
        for (scalar, value) in [(0, 2), (2, 99), (4, 1 << 32), (5, 256), (11, 0), (11, 2000)] {
            let mut forged = page;
            set_word(&mut forged, SCALARS_AT + scalar, value);
            let sum = checksum(&forged);
            set_word(&mut forged, CHECKSUM_AT, sum);
            let error = Cpu::load(&forged).unwrap_err();
            assert!(matches!(error, MachineError::CpuField { .. } | MachineError::Version { .. }), "{error}");
        }
    }
}
