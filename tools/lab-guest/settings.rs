//! What the guest is told to do, as `name=value` words.

use std::time::Duration;

use pagecast::cli::units;
use pagecast::guest::arena::{Spec, Workload};

/// Page writes per second unless told otherwise: what an emulated processor does without being busy all the time.
const DEFAULT_RATE: u32 = 1000;

/// The settings of a guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of memory that it works on.
    pub memory_bytes: u64,
    /// What it does there.
    pub spec: Spec,
    /// Time between two lines of report.
    pub report: Duration,
    /// Time after which it ends; None = never, as init must not.
    pub run_for: Option<Duration>,
}

/// Why a word is no setting.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No such name.
    #[error("unknown setting {0:?}: there are workload, memory, rate, seed, zero, report_ms and seconds")]
    Unknown(String),
    /// The value is not of the name's kind.
    #[error("{word:?}: {why}")]
    Value {
        /// The word.
        word: String,
        /// What the value should be.
        why: String,
    },
}

impl Settings {
    /// Reads the words, each `name=value`.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, SettingsError> {
        let spec = Spec { rate: Some(DEFAULT_RATE), ..Spec::new(Workload::Kv, 1) };
        let mut settings =
            Self { memory_bytes: 64 << 20, spec, report: Duration::from_secs(1), run_for: None };
        for word in words {
            let Some((name, value)) = word.split_once('=') else {
                return Err(SettingsError::Unknown(word));
            };
            let set = match name {
                "workload" => value.parse().map(|w| settings.spec.workload = w).map_err(|e| e.to_string()),
                "memory" => units::size(value).map(|bytes| settings.memory_bytes = bytes),
                "rate" => number(value).map(|rate| settings.spec.rate = Some(rate)),
                "seed" => number(value).map(|seed| settings.spec.seed = seed),
                "zero" => number(value).map(|percent| settings.spec.zero_share_percent = percent),
                "report_ms" => number(value).map(|ms| settings.report = Duration::from_millis(ms)),
                "seconds" => number(value).map(|s| settings.run_for = Some(Duration::from_secs(s))),
                _ => return Err(SettingsError::Unknown(word)),
            };
            set.map_err(|why| SettingsError::Value { word: word.clone(), why })?;
        }
        Ok(settings)
    }
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| "not a whole number, or too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Settings, SettingsError> {
        Settings::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn every_setting_arrives_and_the_others_keep_their_defaults() {
        let settings =
            parse("workload=sweep memory=32M rate=200 seed=9 zero=10 report_ms=250 seconds=3").unwrap();
        let spec = Spec { rate: Some(200), zero_share_percent: 10, ..Spec::new("sweep".parse().unwrap(), 9) };
        let expected = Settings {
            memory_bytes: 32 << 20,
            spec,
            report: Duration::from_millis(250),
            run_for: Some(Duration::from_secs(3)),
        };
        assert_eq!(settings, expected);
        let default = parse("").unwrap();
        assert_eq!((default.memory_bytes, default.spec.effective_rate()), (64 << 20, DEFAULT_RATE));
        assert_eq!(default.run_for, None);
    }

    #[test]
    fn what_is_no_setting_is_named() {
        assert_eq!(parse("rat=5").unwrap_err(), SettingsError::Unknown("rat=5".to_owned()));
        assert_eq!(parse("quiet").unwrap_err(), SettingsError::Unknown("quiet".to_owned()));
        for wrong in ["memory=xM", "rate=-1", "workload=redis", "zero=300"] {
            let error = parse(wrong).unwrap_err();
            assert!(matches!(&error, SettingsError::Value { word, .. } if word == wrong), "{error}");
        }
    }
}
