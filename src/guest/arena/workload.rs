//! What the guest does: the workloads by name, and the specification of a machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Everything that lays down what a machine does, apart from the size of its RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The order in which pages are written.
    pub workload: Workload,
    /// Chooses contents, zero pages, regions and random operations.
    pub seed: u64,
    /// Page writes per second, 0 = as fast as they go; `None` = the workload's own.
    pub rate: Option<u32>,
    /// Share of the 2 MiB chunks that are never written, `0..=90`.
    pub zero_share_percent: u8,
}

impl Spec {
    /// A workload at its own rate, in a RAM of which a quarter is zero pages.
    pub fn new(workload: Workload, seed: u64) -> Self {
        Self { workload, seed, rate: None, zero_share_percent: 25 }
    }

    /// Page writes per second; 0 = as fast as they go.
    pub fn effective_rate(&self) -> u32 {
        self.rate.unwrap_or(self.workload.default_rate())
    }
}

/// The orders in which a guest writes its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// A few timer pages.
    Idle,
    /// A key-value store under zipfian requests.
    Kv,
    /// Every page equally often.
    Uniform,
    /// Bursts that rewrite a region in order, a small hot set in between.
    Sweep,
    /// A generational garbage collector.
    Gc,
    /// Changes its ways every few seconds.
    Phases,
    /// Every page equally often and as fast as memory allows: pre-copy cannot win.
    Storm,
}

impl Workload {
    /// All workloads, in the order of their numbers on the CPU page.
    pub const ALL: [Self; 7] =
        [Self::Idle, Self::Kv, Self::Uniform, Self::Sweep, Self::Gc, Self::Phases, Self::Storm];

    /// The workload's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Kv => "kv",
            Self::Uniform => "uniform",
            Self::Sweep => "sweep",
            Self::Gc => "gc",
            Self::Phases => "phases",
            Self::Storm => "storm",
        }
    }

    /// Page writes per second unless the specification says otherwise; 0 = as fast as they go. Chosen for a
    /// guest of 512 MiB and a link of 76,000 pages/s: demanding, but such that pre-copy can win, except storm.
    pub fn default_rate(self) -> u32 {
        match self {
            Self::Idle => 100,
            Self::Kv => 60_000,
            Self::Uniform => 10_000,
            Self::Sweep => 20_000,
            Self::Gc => 20_000,
            Self::Phases => 40_000,
            Self::Storm => 0,
        }
    }

    /// Whether the rate is the same all the time.
    pub fn is_steady(self) -> bool {
        match self {
            Self::Idle | Self::Kv | Self::Uniform | Self::Storm => true,
            Self::Sweep | Self::Gc | Self::Phases => false,
        }
    }

    /// One line on what the workload does.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Idle => "a quiet guest: 16 timer pages",
            Self::Kv => "a key-value store: zipf 0.99 over 8 keys per page, keys hashed to pages",
            Self::Uniform => "all pages equally often, in random order",
            Self::Sweep => {
                "every 3 s a burst that rewrites a quarter of the pages in order; a 1 % hot set in between"
            }
            Self::Gc => {
                "an allocation front through a young generation of 30 %, collections that copy survivors"
            }
            Self::Phases => "every 2-4 s another of: key-value, sequential, 5 % hot set, nearly idle",
            Self::Storm => "all pages equally often, as fast as memory allows; pre-copy cannot win",
        }
    }

    /// The workload's number on the CPU page.
    pub(super) fn id(self) -> u64 {
        self as u64
    }

    /// The workload with this number.
    pub(super) fn from_id(id: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|workload| workload.id() == id)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no workload has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown workload {name:?}: choose one of {}", Workload::ALL.map(Workload::name).join(", "))]
pub struct UnknownWorkload {
    /// The name that was asked for.
    pub name: String,
}

impl FromStr for Workload {
    type Err = UnknownWorkload;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|workload| workload.name() == name)
            .ok_or_else(|| UnknownWorkload { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_read_back() {
        for workload in Workload::ALL {
            assert_eq!(workload.to_string().parse(), Ok(workload));
            assert_eq!(serde_json::to_string(&workload).unwrap(), format!("\"{workload}\""));
            assert_eq!(Workload::from_id(workload.id()), Some(workload));
        }
        assert_eq!(Workload::from_id(7), None);
    }

    #[test]
    fn an_unknown_name_is_told_the_known_ones() {
        let error = "redis".parse::<Workload>().unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown workload \"redis\": choose one of idle, kv, uniform, sweep, gc, phases, storm"
        );
    }
}
