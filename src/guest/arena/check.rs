//! The machine checks its memory.

use serde::{Deserialize, Serialize};

use super::cpu::Cpu;
use super::fault::{Fault, FaultKind};
use super::layout::{CPU, Role};
use super::machine::Machine;
use super::owned;
use super::table::{self, Entry};
use crate::page::{Pfn, is_zero};

/// The outcome of a full pass over RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Pages checked.
    pub pages: u64,
    /// Errors found in this pass.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<Fault>,
    /// Whether the pass came to its end: all pages and the sum of all writes have been checked.
    pub complete: bool,
}

impl Machine<'_> {
    /// Checks every page, every sequence table, and that the tables add up to the writes the CPU page has
    /// counted. Asks `keep_running` before each page. Errors also count in [`Machine::stats`].
    pub fn check_all(&mut self, keep_running: &mut dyn FnMut() -> bool) -> CheckReport {
        let mut report = CheckReport { pages: 0, errors: 0, first_error: None, complete: false };
        let nr_pages = self.layout.nr_pages();
        while report.pages < nr_pages && keep_running() {
            let fault = self.check(Pfn(report.pages));
            report.add(fault);
            report.pages += 1;
        }
        if report.pages == nr_pages {
            let fault = self.judge_totals().map(|kind| self.cpu.note(kind, CPU));
            report.add(fault);
            report.complete = true;
        }
        self.store_cpu();
        report
    }

    /// Checks one page; counts the check and the error.
    pub(super) fn check(&mut self, pfn: Pfn) -> Option<Fault> {
        self.cpu.checks += 1;
        let (kind, culprit) = match self.layout.role(pfn) {
            Role::Cpu => (self.judge_cpu()?, pfn),
            Role::Table => (self.judge_table(pfn)?, pfn),
            Role::Zero(entry) => self.judge_zero(pfn, entry)?,
            Role::Owned(entry) => self.judge_owned(pfn, entry)?,
        };
        Some(self.cpu.note(kind, culprit))
    }

    /// The CPU page holds what was stored there last. Counts of the check under way are not stored yet, so
    /// only what changes with operations is compared.
    fn judge_cpu(&self) -> Option<FaultKind> {
        let stored = Cpu::load(self.ram.page(CPU));
        let same = stored.is_ok_and(|stored| {
            let now = &self.cpu;
            (stored.ops, stored.writes, stored.rng, stored.registers)
                == (now.ops, now.writes, now.rng, now.registers)
        });
        (!same).then_some(FaultKind::TornCpu)
    }

    fn judge_table(&self, pfn: Pfn) -> Option<FaultKind> {
        table::updates(self.ram.page(pfn), pfn).is_none().then_some(FaultKind::TornTable)
    }

    fn judge_zero(&self, pfn: Pfn, entry: Entry) -> Option<(FaultKind, Pfn)> {
        if self.count(entry) != 0 {
            return Some((FaultKind::TornTable, entry.table));
        }
        (!is_zero(self.ram.page(pfn))).then_some((FaultKind::NotZero, pfn))
    }

    fn judge_owned(&self, pfn: Pfn, entry: Entry) -> Option<(FaultKind, Pfn)> {
        let page = self.ram.page(pfn);
        let Some(label) = owned::read(page) else {
            return Some((if is_zero(page) { FaultKind::Missing } else { FaultKind::Torn }, pfn));
        };
        if label.pfn != pfn {
            return Some((FaultKind::Misplaced, pfn));
        }
        let count = u64::from(self.count(entry));
        if label.seq < count {
            Some((FaultKind::Stale, pfn))
        } else if label.seq > count {
            Some((FaultKind::StaleTable, entry.table))
        } else {
            None
        }
    }

    /// Whether CPU page and tables have counted the same writes. Torn tables have been reported already and
    /// say nothing about the sum.
    fn judge_totals(&self) -> Option<FaultKind> {
        let updates = self.layout.tables().map(|pfn| table::updates(self.ram.page(pfn), pfn));
        let held: u64 = updates.sum::<Option<u64>>()?;
        if held > self.cpu.writes {
            Some(FaultKind::StaleCpu)
        } else if held < self.cpu.writes {
            Some(FaultKind::LostWrites)
        } else {
            None
        }
    }

    fn count(&self, entry: Entry) -> u32 {
        table::count(self.ram.page(entry.table), entry.slot)
    }
}

impl CheckReport {
    fn add(&mut self, fault: Option<Fault>) {
        self.errors += u64::from(fault.is_some());
        self.first_error = self.first_error.or(fault);
    }
}
