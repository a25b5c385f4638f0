//! The files that tell how a migration went.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use tempfile::NamedTempFile;

/// A path in which `{domid}` stands for the domain's number and `{time}` for the time at which the migration ended, in UTC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathTemplate(String);

impl FromStr for PathTemplate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.starts_with('/') || text.ends_with('/') {
            return Err("write the path of a file that begins with /, or none".to_owned());
        }
        let rest = text.replace("{domid}", "").replace("{time}", "");
        if rest.contains(['{', '}']) {
            return Err("only {domid} and {time} are known in braces".to_owned());
        }
        Ok(PathTemplate(text.to_owned()))
    }
}

impl PathTemplate {
    /// The path of one migration's file.
    pub fn fill(&self, domid: u16, time: SystemTime) -> PathBuf {
        self.0.replace("{domid}", &domid.to_string()).replace("{time}", &utc(time)).into()
    }
}

/// Writes a file that only its owner may read: the whole of it or, on an error, none. One that is there is replaced.
///
/// It is not synced to the disk. Libxl waits for the end of this process before it goes on with a guest that stands
/// still, and a sync can take as long as a disk likes.
///
/// Unlike an [`OutputFile`](crate::sys::output_file::OutputFile) it takes the place of a link: root does not follow those of others.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map(drop).map_err(|failed| failed.error)
}

/// Such as `20250131T235959Z`: sorts as text and needs no quoting in a shell.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Years are counted from March, so that the leap day is a year's last, in eras of 400 years from 0000-03-01.
    let since_era = days + 719_468;
    let (era, day_of_era) = (since_era / 146_097, since_era % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn times_are_those_of_the_calendar() {
        // From `date -u -d @N +%Y%m%dT%H%M%SZ`.
        for (seconds, text) in [
            (0, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (951_868_800, "20000301T000000Z"),
            (1_735_689_599, "20241231T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_template_names_a_file_for_each_migration() {
        let template: PathTemplate = "/var/log/pagecast/{domid}-{time}.json".parse().unwrap();
        let path = template.fill(7, UNIX_EPOCH);
        assert_eq!(path, Path::new("/var/log/pagecast/7-19700101T000000Z.json"));
        for (text, says) in [("a.json", "begins with /"), ("/a/", "begins with /"), ("/{name}", "{domid}")] {
            let error = text.parse::<PathTemplate>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_only_its_owner_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        std::fs::write(&path, "a longer text of before").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        write(&path, "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing else is left behind");
        let link = folder.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write(&link, "newer").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new", "a link is not followed");
    }

    #[test]
    fn what_cannot_be_written_is_an_error_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write(&folder.path().join("nowhere/report.json"), "text").is_err());
        let occupied = folder.path().join("occupied");
        std::fs::create_dir(&occupied).unwrap();
        assert!(write(&occupied, "text").is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }
}
