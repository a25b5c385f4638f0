//! Xen's version, and what depends on it: `xen/include/public/version.h`.

use std::fmt;

/// XENVER_version: major version in the upper half of the result, minor in the lower.
pub const XENVER_VERSION: u64 = 0;

/// XENVER_extraversion: what follows, such as ".7", as 16 bytes.
pub const XENVER_EXTRAVERSION: u64 = 1;

/// Bytes of an extraversion, NUL included.
pub const EXTRAVERSION_LEN: usize = 16;

/// The version of a running Xen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct XenVersion {
    /// 4 for any Xen of the last ten years.
    pub major: u32,
    /// The release.
    pub minor: u32,
    /// The point release; None where the extraversion does not begin with one.
    pub point: Option<u32>,
}

impl XenVersion {
    /// The version that xen_version and an extraversion tell.
    pub fn new(packed: u32, extra: &[u8]) -> Self {
        let digits: String = match extra.strip_prefix(b".") {
            Some(rest) => {
                rest.iter().take_while(|byte| byte.is_ascii_digit()).map(|byte| char::from(*byte)).collect()
            }
            None => String::new(),
        };
        XenVersion { major: packed >> 16, minor: packed & 0xffff, point: digits.parse().ok() }
    }

    /// XEN_DOMCTL_INTERFACE_VERSION of the release, where it is known. Point releases never change it; a wrong one is
    /// refused with EACCES.
    pub fn domctl_interface(self) -> Option<u32> {
        match (self.major, self.minor) {
            (4, 17) => Some(0x15),
            (4, 18) => Some(0x16),
            (4, 19..=21) => Some(0x17),
            (4, 22) => Some(0x18),
            _ => None,
        }
    }

    /// Whether a page that is added to or taken out of an HVM guest's p2m shows in the dirty log: since Xen's commit
    /// 98fccdf0ac ("x86/mm: update log-dirty bitmap when manipulating P2M").
    pub fn logs_p2m_changes(self) -> bool {
        let since = match (self.major, self.minor) {
            (4, 19) => 5,
            (4, 20) => 3,
            (4, 21) => 1,
            (major, minor) => return (major, minor) >= (4, 22),
        };
        self.point.is_some_and(|point| point >= since)
    }
}

impl fmt::Display for XenVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        match self.point {
            Some(point) => write!(f, ".{point}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(minor: u32, extra: &str) -> XenVersion {
        XenVersion::new(4 << 16 | minor, extra.as_bytes())
    }

    #[test]
    fn every_release_from_4_17_to_4_22_has_its_interface_and_no_other_has() {
        let known: Vec<_> = (16..=23).map(|minor| version(minor, "").domctl_interface()).collect();
        let expected = [None, Some(0x15), Some(0x16), Some(0x17), Some(0x17), Some(0x17), Some(0x18), None];
        assert_eq!(known, expected);
        assert_eq!(XenVersion::new(5 << 16 | 17, b"").domctl_interface(), None);
    }

    #[test]
    fn the_point_release_is_the_number_behind_the_first_dot() {
        for (extra, point, text) in [
            (".7\0\0", Some(7), "4.17.7"),
            (".12-pre", Some(12), "4.17.12"),
            ("-unstable", None, "4.17"),
            ("", None, "4.17"),
        ] {
            let found = version(17, extra);
            assert_eq!((found.point, found.to_string()), (point, text.to_owned()), "{extra}");
        }
    }

    #[test]
    fn p2m_changes_are_logged_from_the_point_release_that_has_the_fix() {
        let logs = |minor, extra| version(minor, extra).logs_p2m_changes();
        assert!(!logs(17, ".7") && !logs(18, ".9"));
        assert!(!logs(19, ".4") && logs(19, ".5") && !logs(20, ".2") && logs(20, ".3"));
        assert!(!logs(21, ".0") && logs(21, ".1") && !logs(21, "-rc"));
        assert!(logs(22, ".0") && logs(22, "") && logs(23, "-unstable"));
    }
}
