//! How a migration is to be done, as far as xl's command line cannot say it: a file and the environment.
//!
//! `/etc/pagecast.toml`, or what `PAGECAST_CONFIG` names, then variables: `PAGECAST_POLICY` for the key `policy`, and
//! so on. A variable wins over the file. What is not understood is an error: a limit that is silently not kept would be
//! noticed by the other guests of the host. docs/save-helper.md has the table of the keys.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::report_file::PathTemplate;
use crate::cli::units;
use crate::forecast::{OnNoConvergence, PolicyKind};
use crate::pipeline::settings::{Pins, SendMode, Settings, SlotPages};
use crate::sys::cpu;

/// The file, unless `PAGECAST_CONFIG` names another.
pub const DEFAULT_PATH: &str = "/etc/pagecast.toml";

const PREFIX: &str = "PAGECAST_";
const CONFIG: &str = "PAGECAST_CONFIG";

/// The longest file that is read.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// Every key.
const KEYS: [&str; 14] = [
    "policy",
    "downtime_budget",
    "bandwidth",
    "deadline",
    "on_no_convergence",
    "linger",
    "sample_share",
    "pin",
    "slots",
    "send",
    "windows",
    "report",
    "summary",
    "stock_helper",
];

/// The longest time between two samples of the dirty log.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// What is configured.
#[derive(Clone, Debug)]
pub struct Options {
    /// For the pipeline. `sample_interval` is the longest one that serves the downtime budget; `sample_share` is more than 0
    /// and 0.5 at most.
    pub settings: Settings,
    /// The most guest memory to keep mapped, in bytes.
    pub window_bytes: u64,
    /// Where the report goes, a file of JSON.
    pub report: Option<PathTemplate>,
    /// Where the summary for people goes.
    pub summary: Option<PathTemplate>,
    /// The stock save helper, where it is not to be searched for.
    pub stock_helper: Option<PathBuf>,
}

/// What is wrong with the configuration, in one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// The file is no TOML.
    #[error("{path}, line {line}: {reason}")]
    Syntax {
        /// The file.
        path: String,
        /// Where in it.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// There is no such key.
    #[error("{place}: there is no such setting; there are {}", KEYS.join(", "))]
    Unknown {
        /// The file and the key, or the variable.
        place: String,
    },
    /// The value makes no sense.
    #[error("{place} = {value}: {allowed}")]
    Value {
        /// The file and the key, or the variable.
        place: String,
        /// As it is written.
        value: String,
        /// What is wrong with it, and what would do.
        allowed: String,
    },
    /// The machine does not tell what it has.
    #[error("cannot tell which cores this process may use: {0}")]
    Cores(String),
}

impl Options {
    /// Reads the file and the variables of this process.
    pub fn load() -> Result<Self, ConfigError> {
        let cores = cpu::allowed_cores().map_err(|error| ConfigError::Cores(error.to_string()))?;
        Self::read(std::env::vars_os().collect(), Path::new(DEFAULT_PATH), &cores)
    }

    fn read(
        variables: Vec<(OsString, OsString)>,
        default_path: &Path,
        cores: &[usize],
    ) -> Result<Self, ConfigError> {
        if cores.is_empty() {
            return Err(ConfigError::Cores("there are none".to_owned()));
        }
        let mut options = Self::defaults(cores);
        let named = variables.iter().find(|(name, _)| name == CONFIG).map(|(_, path)| Path::new(path));
        if let Some(text) = read_file(named.unwrap_or(default_path), named.is_some())? {
            options.take_file(named.unwrap_or(default_path), &text, cores)?;
        }
        for (name, value) in &variables {
            options.take_variable(name, value, cores)?;
        }
        let third = options.settings.downtime_budget / 3;
        options.settings.sample_interval = SAMPLE_INTERVAL.min(third);
        Ok(options)
    }

    /// What holds where nothing is configured.
    pub(super) fn defaults(cores: &[usize]) -> Self {
        let settings = Settings {
            policy: PolicyKind::Ar,
            downtime_budget: Duration::from_millis(300),
            max_time: Duration::from_secs(3600),
            on_no_convergence: OnNoConvergence::Stop,
            linger: 0.25,
            sample_interval: SAMPLE_INTERVAL,
            sample_share: Some(0.02),
            bandwidth: None,
            send: SendMode::Auto,
            congestion: None,
            // The stream is one descriptor.
            lanes: 1,
            pins: Pins::among(cores, 1),
            spin: false,
            slots: 16,
            slot_pages: SlotPages::Auto,
            verify: false,
        };
        Options { settings, window_bytes: 1 << 30, report: None, summary: None, stock_helper: None }
    }

    fn take_file(&mut self, path: &Path, text: &str, cores: &[usize]) -> Result<(), ConfigError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: path.display().to_string(),
            line: 1 + text.bytes().take(error.span().map_or(0, |span| span.start)).filter(is_newline).count(),
            reason: error.message().replace('\n', "; "),
        })?;
        for (key, value) in table {
            let place = format!("{}: {}", path.display(), key.escape_debug());
            if !KEYS.contains(&key.as_str()) {
                return Err(ConfigError::Unknown { place });
            }
            let text = match &value {
                toml::Value::String(text) => text.clone(),
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                other => {
                    let allowed = "write a text in quotation marks or a number".to_owned();
                    let value = format!("a TOML {}", other.type_str());
                    return Err(ConfigError::Value { place, value, allowed });
                }
            };
            self.take(place, &key, &text, cores)?;
        }
        Ok(())
    }

    fn take_variable(
        &mut self,
        name: &OsString,
        value: &OsString,
        cores: &[usize],
    ) -> Result<(), ConfigError> {
        let lossy = name.to_string_lossy();
        let Some(rest) = lossy.strip_prefix(PREFIX).filter(|_| name != CONFIG) else {
            return Ok(());
        };
        let place = lossy.escape_debug().to_string();
        let key = rest.to_ascii_lowercase();
        if key.to_ascii_uppercase() != rest || !KEYS.contains(&key.as_str()) {
            return Err(ConfigError::Unknown { place });
        }
        let Some(text) = value.to_str() else {
            let allowed = "write UTF-8".to_owned();
            return Err(ConfigError::Value { place, value: format!("{value:?}"), allowed });
        };
        self.take(place, &key, text, cores)
    }

    fn take(&mut self, place: String, key: &str, text: &str, cores: &[usize]) -> Result<(), ConfigError> {
        let value = format!("{text:?}");
        self.set(key, text, cores).map_err(|allowed| ConfigError::Value { place, value, allowed })
    }

    /// Sets what one of [`KEYS`] stands for.
    fn set(&mut self, key: &str, text: &str, cores: &[usize]) -> Result<(), String> {
        let settings = &mut self.settings;
        match key {
            "policy" => settings.policy = word(text)?,
            "downtime_budget" => settings.downtime_budget = at_least_a_millisecond(text)?,
            "bandwidth" => settings.bandwidth = units::rate(text)?,
            "deadline" => settings.max_time = at_least_a_millisecond(text)?,
            "on_no_convergence" => settings.on_no_convergence = word(text)?,
            "linger" => settings.linger = units::percent(text)?,
            "sample_share" => self.settings.sample_share = Some(share(text)?),
            "pin" => settings.pins = Pins::parse(text, &Pins::among(cores, 1), cores)?,
            "slots" => settings.slots = slots(text)?,
            "send" => settings.send = word(text)?,
            "windows" => self.window_bytes = windows(text)?,
            "report" => self.report = unless_none(text, PathTemplate::from_str)?,
            "summary" => self.summary = unless_none(text, PathTemplate::from_str)?,
            "stock_helper" => self.stock_helper = unless_none(text, absolute)?,
            _ => unreachable!("only keys of KEYS get here"),
        }
        Ok(())
    }
}

fn is_newline(byte: &u8) -> bool {
    *byte == b'\n'
}

/// The file's text; None if it is not there and nobody asked for it.
fn read_file(path: &Path, wanted: bool) -> Result<Option<String>, ConfigError> {
    let failed = |reason| ConfigError::Read { path: path.display().to_string(), reason };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && !wanted => return Ok(None),
        other => other.map_err(|error| failed(error.to_string()))?,
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(failed(format!("it is longer than {} KiB", MAX_FILE_BYTES >> 10)));
    }
    Ok(Some(text))
}

fn word<T: FromStr<Err: Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn at_least_a_millisecond(text: &str) -> Result<Duration, String> {
    match units::time(text)? {
        time if time < Duration::from_millis(1) => Err("it is to be 1ms at least".to_owned()),
        time => Ok(time),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match units::percent(text) {
        Ok(share) if share > 0.0 && share <= 0.5 => Ok(share),
        _ => Err("write a share of more than 0% and 50% at most, for example 2%".to_owned()),
    }
}

fn slots(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (4..=4096).contains(number));
    number.ok_or_else(|| "write a number from 4 to 4096".to_owned())
}

fn windows(text: &str) -> Result<u64, String> {
    match units::size(text)? {
        bytes if bytes < 2 << 20 => Err("it is to be 2MiB at least".to_owned()),
        bytes => Ok(bytes),
    }
}

fn unless_none<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if text == "none" { Ok(None) } else { read(text).map(Some) }
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("write a path that begins with /, or none".to_owned()) }
}

#[cfg(test)]
mod tests;
