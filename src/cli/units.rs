//! Sizes, rates and times as people write them.

use std::time::Duration;

/// Reads a size in bytes: `512MiB`, `2G`, `4096`. K, M, G and T are binary here, as everywhere with memory.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{unit:?} is no unit of size; write for example 512MiB or 4G")),
    };
    whole(number * f64::from(1u32 << (shift % 31)) * if shift == 40 { 2f64.powi(31) } else { 1.0 }, text)
}

/// Reads a share of 0 to 100 %: `25%`, `0%`.
pub fn percent(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    match percent {
        Some(percent) if (0.0..=100.0).contains(&percent) => Ok(percent / 100.0),
        _ => Err("write a share from 0% to 100%, for example 25%".to_owned()),
    }
}

/// Reads a rate and gives bytes per second: `2.5Gbit` (decimal bits per second, as of a network), `300MB` (decimal
/// bytes), `1GiB`; `none` is no limit. A trailing `/s` is welcome.
pub fn rate(text: &str) -> Result<Option<u64>, String> {
    if matches!(text, "none" | "unlimited") {
        return Ok(None);
    }
    let (number, unit) = split(text.trim_end_matches("/s"))?;
    let bytes = match unit {
        "bit" => 0.125,
        "Kbit" | "kbit" => 125.0,
        "Mbit" => 125e3,
        "Gbit" => 125e6,
        "B" => 1.0,
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        _ => return Err(format!("{unit:?} is no unit of rate; write for example 2.5Gbit, 300MB or none")),
    };
    match whole(number * bytes, text)? {
        slow if slow < 8192 => {
            Err(format!("{text:?} is less than two pages a second; write for example 2.5Gbit"))
        }
        bytes_per_s => Ok(Some(bytes_per_s)),
    }
}

/// Reads a time: `300ms`, `1.5s`, `2min`, `50us`.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(format!("{unit:?} is no unit of time; write for example 300ms or 1.5s")),
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if seconds <= 366.0 * 86400.0 => Ok(time),
        _ => Err(format!("{text:?} is more than a year")),
    }
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} does not begin with a number; write for example 1.5G"))?;
    Ok((number, unit.trim_start()))
}

fn whole(number: f64, text: &str) -> Result<u64, String> {
    if (0.0..9e18).contains(&number) {
        Ok(number.round() as u64)
    } else {
        Err(format!("{text:?} is too much"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_mean_what_they_say() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("1.5G"), Ok(3 << 29));
        assert_eq!(size("2T"), Ok(2 << 40));
        assert_eq!(rate("2.5Gbit"), Ok(Some(312_500_000)));
        assert_eq!(rate("300MB/s"), Ok(Some(300_000_000)));
        assert_eq!(rate("1GiB"), Ok(Some(1 << 30)));
        assert_eq!(rate("none"), Ok(None));
        assert_eq!(time("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("2min"), Ok(Duration::from_secs(120)));
    }

    #[test]
    fn what_is_not_understood_says_what_to_write() {
        for (error, says) in [
            (size("many").unwrap_err(), "number"),
            (size("5Q").unwrap_err(), "512MiB"),
            (size("99999999T").unwrap_err(), "too much"),
            (rate("10").unwrap_err(), "2.5Gbit"),
            (rate("0Gbit").unwrap_err(), "two pages"),
            (rate("1.2.3MB").unwrap_err(), "number"),
            (time("300").unwrap_err(), "300ms"),
            (time("-1s").unwrap_err(), "number"),
            (time("9999999h").unwrap_err(), "year"),
        ] {
            assert!(error.contains(says), "{error}");
        }
    }
}
