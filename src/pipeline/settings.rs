//! How a migration is to be done: what the command line says, in the pipeline's terms.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::forecast::{OnNoConvergence, PolicyKind};

/// How pages get onto the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SendMode {
    /// Zero-copy from guest memory itself.
    Direct,
    /// Copied into a slot by the mapper, zero-copy from there.
    Staged,
    /// Copied into a slot by the mapper, and by the kernel from there, while it is in the cache.
    StagedCopy,
    /// Copied from guest memory by the kernel, as stock Xen does.
    Copy,
    /// Direct or staged, whichever the guest's memory allows; copying sends once the kernel turns out to copy anyway.
    Auto,
}

impl SendMode {
    /// All modes, in the order in which help lists them.
    pub const ALL: [SendMode; 5] =
        [SendMode::Direct, SendMode::Staged, SendMode::StagedCopy, SendMode::Copy, SendMode::Auto];
}

impl fmt::Display for SendMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SendMode::Direct => "direct",
            SendMode::Staged => "staged",
            SendMode::StagedCopy => "staged-copy",
            SendMode::Copy => "copy",
            SendMode::Auto => "auto",
        })
    }
}

impl FromStr for SendMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|mode| mode.to_string() == name);
        known.ok_or_else(|| {
            format!("there is no send mode {name:?}; choose direct, staged, staged-copy, copy or auto")
        })
    }
}

/// What slots are to be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotPages {
    /// 4 KiB pages for zero-copy sends, huge pages for the others.
    Auto,
    /// 4 KiB pages.
    Small,
    /// Huge pages, if there are any.
    Huge,
}

impl FromStr for SlotPages {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(SlotPages::Auto),
            "small" => Ok(SlotPages::Small),
            "huge" => Ok(SlotPages::Huge),
            _ => Err(format!("there are no {name:?} pages; choose auto, small or huge")),
        }
    }
}

/// Cores for the threads of each stage; a lane takes the core at its number, counted round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    /// The scanner's core.
    pub scan: usize,
    /// The mappers' cores; not empty.
    pub map: Vec<usize>,
    /// The senders' cores; not empty.
    pub send: Vec<usize>,
}

impl Pins {
    /// A sensible choice among `cores` (not empty): senders keep cores of their own as long as there are enough,
    /// because they decide the throughput; the scanner, mostly asleep, shares with a mapper first.
    pub fn among(cores: &[usize], lanes: usize) -> Self {
        let core = |number: usize| cores[number % cores.len()];
        let send = (0..lanes).map(|lane| core(cores.len() - 1 - lane % cores.len().div_ceil(2))).collect();
        let map = (0..lanes).map(|lane| core(lane % (cores.len() / 2).max(1))).collect();
        let scan = if cores.len() >= 3 + lanes { core(cores.len() / 2 - 1) } else { core(0) };
        Pins { scan, map, send }
    }

    /// Reads `map=2,scan=4,send=6` with lists like `2+3` or `4-7` for several lanes. Stages left out keep what
    /// `default` says.
    pub fn parse(text: &str, default: &Pins, allowed: &[usize]) -> Result<Self, String> {
        let mut pins = default.clone();
        for part in text.split(',') {
            let (stage, cores) = part.split_once('=').ok_or_else(|| {
                format!("{part:?} is not STAGE=CORES; write for example map=0,scan=0,send=1")
            })?;
            let cores = parse_cores(cores)?;
            if let Some(core) = cores.iter().find(|core| !allowed.contains(core)) {
                return Err(format!("core {core} is not among those this process may use: {allowed:?}"));
            }
            match stage {
                "map" => pins.map = cores,
                "send" => pins.send = cores,
                "scan" if cores.len() == 1 => pins.scan = cores[0],
                "scan" => return Err("there is one scanner: give it one core".to_owned()),
                _ => return Err(format!("there is no stage {stage:?}; the stages are map, scan and send")),
            }
        }
        Ok(pins)
    }
}

impl fmt::Display for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |cores: &[usize]| cores.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
        write!(f, "map={},scan={},send={}", list(&self.map), self.scan, list(&self.send))
    }
}

fn parse_cores(text: &str) -> Result<Vec<usize>, String> {
    let number = |text: &str| {
        text.parse::<usize>()
            .map_err(|_| format!("{text:?} is not a core number; write for example 2, 2+3 or 4-7"))
    };
    let mut cores = Vec::new();
    for part in text.split('+') {
        match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last || last - first >= 4096 {
                    return Err(format!("{part:?} is not a range of cores"));
                }
                cores.extend(first..=last);
            }
            None => cores.push(number(part)?),
        }
    }
    Ok(cores)
}

/// How a migration is to be done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which page goes next.
    pub policy: PolicyKind,
    /// How long the guest may be stopped.
    pub downtime_budget: Duration,
    /// How long the guest may be migrated live.
    pub max_time: Duration,
    /// What happens then, and when the forecast finds before that pre-copy cannot converge.
    pub on_no_convergence: OnNoConvergence,
    /// The share of a rest that fits the budget, from 0 to 1, that may be written again while it is sent before the stop instead
    /// of after it, to shorten the downtime. 0: the stop comes as soon as the rest fits.
    pub linger: f64,
    /// Time between two samples of the dirty log.
    pub sample_interval: Duration,
    /// The share of the guest's time that sampling may take, from 0 to 1: where a sample takes longer than the interval
    /// allows for, the next one waits, and policies in rounds take one a round, as Xen does. None: no limit.
    pub sample_share: Option<f64>,
    /// The most to send, in bytes per second.
    pub bandwidth: Option<u64>,
    /// How pages get onto the wire.
    pub send: SendMode,
    /// The TCP congestion control of the connections; None: the system's.
    pub congestion: Option<String>,
    /// Connections, each with a mapper and a sender.
    pub lanes: usize,
    /// Where the threads run.
    pub pins: Pins,
    /// Idle stages burn their cores.
    pub spin: bool,
    /// Slots of each lane.
    pub slots: usize,
    /// What the slots are made of.
    pub slot_pages: SlotPages,
    /// Compare every page at the switch-over, with the guest stopped.
    pub verify: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_pins_fit_every_number_of_cores_and_lanes() {
        for nr_cores in 1..=16 {
            let cores: Vec<usize> = (10..10 + nr_cores).collect();
            for lanes in 1..=4 {
                let pins = Pins::among(&cores, lanes);
                assert_eq!((pins.map.len(), pins.send.len()), (lanes, lanes));
                let all = pins.map.iter().chain(&pins.send).chain([&pins.scan]);
                assert!(all.into_iter().all(|core| cores.contains(core)), "{nr_cores} cores: {pins}");
                if nr_cores >= 2 {
                    assert!(
                        pins.map.iter().all(|core| !pins.send.contains(core)),
                        "{nr_cores} cores: {pins}"
                    );
                }
            }
        }
    }

    #[test]
    fn pins_are_read_as_written_and_bad_ones_say_what_to_do() {
        let allowed: Vec<usize> = (0..8).collect();
        let default = Pins::among(&allowed, 1);
        let pins = Pins::parse("map=2+3,scan=1,send=4-6", &default, &allowed).unwrap();
        assert_eq!(pins, Pins { scan: 1, map: vec![2, 3], send: vec![4, 5, 6] });
        assert_eq!(Pins::parse(&pins.to_string(), &default, &allowed).unwrap(), pins);
        for (text, says) in [
            ("map", "STAGE=CORES"),
            ("map=9", "core 9 is not among"),
            ("map=x", "not a core number"),
            ("scan=1+2", "one core"),
            ("mapp=1", "no stage"),
            ("send=5-4", "not a range"),
        ] {
            let error = Pins::parse(text, &default, &allowed).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
