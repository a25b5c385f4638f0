//! Xen's own save helper, which does what pagecast does not: where it is, and becoming it.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::sys::exec;

/// Its file name everywhere.
const NAME: &str = "libxl-save-helper";

/// Where it is when a host has one Xen.
const FOLDERS: [&str; 5] = [
    "usr/libexec/xen/bin",
    "usr/lib/xen/bin",
    "usr/lib64/xen/bin",
    "usr/local/libexec/xen/bin",
    "usr/local/lib/xen/bin",
];

/// Why there is no stock helper to become.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// It is in none of the usual places.
    #[error(
        "Xen's own {NAME} is not in /usr/lib/xen-*/bin, /usr/libexec/xen/bin or the like; set stock_helper in \
         /etc/pagecast.toml or PAGECAST_STOCK_HELPER to where it is"
    )]
    NotFound,
    /// The one that is configured is none.
    #[error("stock_helper is {path}: {reason}; set it to Xen's own {NAME}")]
    Unusable {
        /// What is configured.
        path: String,
        /// Why it will not do.
        reason: String,
    },
    /// It could not be run.
    #[error("cannot run {path}: {source}")]
    Exec {
        /// The stock helper.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl StockError {
    /// For libxl.
    pub fn errno(&self) -> i32 {
        match self {
            StockError::NotFound | StockError::Unusable { .. } => libc::ENOENT,
            StockError::Exec { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Finds it: the one that is configured and no other, or else the one of the running Xen, the only one, or that of the
/// latest Xen.
pub fn find(configured: Option<&Path>) -> Result<PathBuf, StockError> {
    find_under(Path::new("/"), configured)
}

/// Becomes it. Returns only if that fails, and then why.
pub fn exec(program: &Path, argv: &[OsString]) -> StockError {
    StockError::Exec { path: program.display().to_string(), source: exec::exec(program, argv) }
}

fn find_under(root: &Path, configured: Option<&Path>) -> Result<PathBuf, StockError> {
    if let Some(path) = configured {
        return match usable(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(reason) => Err(StockError::Unusable { path: path.display().to_string(), reason }),
        };
    }
    let found = candidates(root).into_iter().find(|path| usable(path).is_ok());
    found.ok_or(StockError::NotFound)
}

/// Every place where it may be, the likeliest first.
fn candidates(root: &Path) -> Vec<PathBuf> {
    let mut versions: Vec<(u32, u32)> = Vec::new();
    for entry in std::fs::read_dir(root.join("usr/lib")).into_iter().flatten().flatten() {
        let name = entry.file_name();
        versions.extend(name.to_str().and_then(|name| version(name.strip_prefix("xen-")?)));
    }
    versions.sort_by(|one, other| other.cmp(one));
    // Debian puts each Xen's programs into a folder of its own, and keeps those of former ones.
    let running = running_version(root).filter(|running| versions.contains(running));
    versions.retain(|version| Some(*version) != running);
    let of_version =
        |(major, minor): (u32, u32)| root.join(format!("usr/lib/xen-{major}.{minor}/bin/{NAME}"));
    let unversioned = FOLDERS.iter().map(|folder| root.join(folder).join(NAME));
    running
        .into_iter()
        .map(of_version)
        .chain(unversioned)
        .chain(versions.into_iter().map(of_version))
        .collect()
}

/// The version of the Xen that this host runs on, where it says.
fn running_version(root: &Path) -> Option<(u32, u32)> {
    let folder = root.join("sys/hypervisor/version");
    let read = |name| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok();
    Some((read("major")?, read("minor")?))
}

/// Reads `4.17`.
fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Whether a file can be run in this program's place.
fn usable(path: &Path) -> Result<(), String> {
    let file = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !file.is_file() || file.permissions().mode() & 0o111 == 0 {
        return Err("it is no program".to_owned());
    }
    let own = std::fs::metadata("/proc/self/exe").map_err(|error| format!("/proc/self/exe: {error}"))?;
    if (file.dev(), file.ino()) == (own.dev(), own.ino()) {
        return Err("it is pagecast itself".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A root folder with stock helpers in `folders`.
    fn root(folders: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for folder in folders {
            put(&root.path().join(folder).join(NAME), 0o755);
        }
        root
    }

    fn put(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    fn found(root: &tempfile::TempDir) -> Option<String> {
        let path = find_under(root.path(), None).ok()?;
        let folder = path.parent().unwrap().strip_prefix(root.path()).unwrap();
        Some(folder.to_str().unwrap().to_owned())
    }

    fn runs_on(root: &tempfile::TempDir, major: &str, minor: &str) {
        let folder = root.path().join("sys/hypervisor/version");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("major"), major).unwrap();
        fs::write(folder.join("minor"), minor).unwrap();
    }

    #[test]
    fn every_usual_folder_is_looked_into() {
        for folder in FOLDERS.into_iter().chain(["usr/lib/xen-4.17/bin"]) {
            assert_eq!(found(&root(&[folder])).as_deref(), Some(folder));
        }
        assert_eq!(found(&root(&["usr/lib/xen-common/bin", "opt/xen/bin"])), None);
    }

    #[test]
    fn of_several_versions_it_is_the_running_xens_and_else_the_latest() {
        let several = root(&["usr/lib/xen-4.9/bin", "usr/lib/xen-4.17/bin", "usr/lib/xen-4.20/bin"]);
        assert_eq!(found(&several).as_deref(), Some("usr/lib/xen-4.20/bin"), "4.9 is older than 4.20");
        runs_on(&several, "4\n", "17\n");
        assert_eq!(found(&several).as_deref(), Some("usr/lib/xen-4.17/bin"));
        runs_on(&several, "4\n", "18\n");
        assert_eq!(found(&several).as_deref(), Some("usr/lib/xen-4.20/bin"));
        put(&several.path().join("usr/lib/xen/bin").join(NAME), 0o755);
        assert_eq!(found(&several).as_deref(), Some("usr/lib/xen/bin"), "it is not of a wrong version");
        runs_on(&several, "4\n", "9\n");
        assert_eq!(found(&several).as_deref(), Some("usr/lib/xen-4.9/bin"));
    }

    #[test]
    fn what_cannot_be_run_and_what_is_pagecast_itself_is_passed_over() {
        let root = root(&["usr/lib/xen/bin"]);
        put(&root.path().join("usr/libexec/xen/bin").join(NAME), 0o644);
        let own = root.path().join("usr/lib/xen-4.17/bin").join(NAME);
        fs::create_dir_all(own.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(std::env::current_exe().unwrap(), own).unwrap();
        runs_on(&root, "4\n", "17\n");
        assert_eq!(found(&root).as_deref(), Some("usr/lib/xen/bin"));
    }

    #[test]
    fn what_is_configured_is_taken_or_refused_with_the_reason_and_never_replaced() {
        let root = root(&["usr/lib/xen/bin", "opt"]);
        let at = |path: &Path| find_under(root.path(), Some(path));
        let good = root.path().join("opt").join(NAME);
        assert_eq!(at(&good).unwrap(), good);
        let plain = root.path().join("plain");
        put(&plain, 0o644);
        for (path, says) in [
            (root.path().join("missing"), "No such file"),
            (plain, "no program"),
            (root.path().to_owned(), "no program"),
            (std::env::current_exe().unwrap(), "pagecast itself"),
        ] {
            let error = at(&path).unwrap_err();
            assert_eq!(error.errno(), libc::ENOENT);
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
