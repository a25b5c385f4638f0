//! What the machine finds wrong with its memory.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::page::Pfn;

/// One finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What is wrong.
    pub kind: FaultKind,
    /// The page that is wrong.
    #[serde(with = "PfnNumber")]
    pub pfn: Pfn,
    /// The number of the operation at which it was found.
    pub op: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} {} (found at operation {})", self.pfn, self.kind, self.op)
    }
}

/// A page number as serde sees it.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Pfn")]
struct PfnNumber(u64);

/// The ways in which a page can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// A page that has been written is all zero, as if it had never been sent.
    Missing,
    /// A page's checksum is wrong: parts of two versions, or damage.
    Torn,
    /// A page carries the number of another page.
    Misplaced,
    /// A whole page, but an older version than the sequence table knows of.
    Stale,
    /// A page that was never written is not all zero.
    NotZero,
    /// A sequence table's header, sum or entries contradict one another.
    TornTable,
    /// A whole sequence table, but older than the pages it counts.
    StaleTable,
    /// The CPU page in memory is not what the machine last stored there.
    TornCpu,
    /// The sequence tables hold more writes than the CPU page has counted.
    StaleCpu,
    /// The CPU page has counted more writes than the sequence tables hold.
    LostWrites,
}

impl FaultKind {
    const ALL: [Self; 10] = [
        Self::Missing,
        Self::Torn,
        Self::Misplaced,
        Self::Stale,
        Self::NotZero,
        Self::TornTable,
        Self::StaleTable,
        Self::TornCpu,
        Self::StaleCpu,
        Self::LostWrites,
    ];

    /// The kind's number on the CPU page; never 0.
    pub(super) fn id(self) -> u64 {
        self as u64 + 1
    }

    /// The kind with this number.
    pub(super) fn from_id(id: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "is all zero but has been written",
            Self::Torn => "is torn or damaged",
            Self::Misplaced => "carries another page's number",
            Self::Stale => "is an older version",
            Self::NotZero => "is not zero but was never written",
            Self::TornTable => "is a torn or damaged sequence table",
            Self::StaleTable => "is an older version of a sequence table",
            Self::TornCpu => "is not the CPU page that was stored",
            Self::StaleCpu => "is an older version of the CPU page",
            Self::LostWrites => "has counted writes that the sequence tables do not hold",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_cpu_page_and_json() {
        for kind in FaultKind::ALL {
            assert_eq!(FaultKind::from_id(kind.id()), Some(kind));
            let fault = Fault { kind, pfn: Pfn(9), op: 4 };
            let json = serde_json::to_string(&fault).unwrap();
            assert!(json.contains("\"pfn\":9"), "{json}");
            assert_eq!(serde_json::from_str::<Fault>(&json).unwrap(), fault);
        }
        assert_eq!(FaultKind::from_id(0), None);
    }
}
