//! Files that programs leave to their users. What was there before stays until the new one is whole, and for good if it never is.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use tempfile::NamedTempFile;

/// A file that takes its place, and that of a file of this name, when it is whole. It is written beside it, and goes if it is
/// dropped before. A device or a pipe is written to as it is.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// To be renamed.
    Beside(NamedTempFile),
    /// The file itself.
    There(File),
}

/// Where a file is to be.
struct Target {
    path: PathBuf,
    /// That of the file that is there.
    mode: Option<u32>,
    /// It is a device or a pipe.
    special: bool,
}

impl Target {
    fn at(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(there) if there.is_file() => {
                // Whoever may not write to it may not replace it either.
                File::options().write(true).open(path)?;
                let mode = Some(there.permissions().mode() & 0o777);
                Ok(Target { path: fs::canonicalize(path)?, mode, special: false })
            }
            Ok(there) if there.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(_) => Ok(Target { path: path.to_owned(), mode: None, special: true }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Target { path: path.to_owned(), mode: None, special: false })
            }
            Err(error) => Err(error),
        }
    }

    fn folder(&self) -> &Path {
        self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

impl OutputFile {
    /// Whether a file can be written at `path`. Nothing is made or changed.
    ///
    /// # Errors
    ///
    /// What [`OutputFile::create`] would err with, a full disk apart.
    pub fn check(path: &Path) -> io::Result<()> {
        let target = Target::at(path)?;
        if target.special {
            return Ok(());
        }
        Ok(access(target.folder(), Access::WRITE_OK | Access::EXEC_OK)?)
    }

    /// Begins the file that will be at `path`.
    ///
    /// # Errors
    ///
    /// `path` is a folder or in none, or this process may not write to it.
    pub fn create(path: &Path) -> io::Result<Self> {
        let target = Target::at(path)?;
        if target.special {
            let place = Place::There(File::options().write(true).open(path)?);
            return Ok(OutputFile { path: target.path, place });
        }
        let name = target.path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        fs::metadata(target.folder())?;
        let beside = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(target.folder())
            // What it says names a file that nobody has heard of.
            .map_err(|error| io::Error::from(error.kind()))?;
        if let Some(mode) = target.mode {
            beside.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
        }
        Ok(OutputFile { path: target.path, place: Place::Beside(beside) })
    }

    /// It is whole.
    ///
    /// # Errors
    ///
    /// It could not be put in its place, and is gone; what was there is still there.
    pub fn commit(mut self) -> io::Result<()> {
        self.flush()?;
        match self.place {
            Place::Beside(file) => file.persist(&self.path).map(drop).map_err(|failed| failed.error),
            Place::There(_) => Ok(()),
        }
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.place {
            Place::Beside(file) => file.as_file_mut().write(bytes),
            Place::There(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.place {
            Place::Beside(file) => file.as_file_mut().flush(),
            Place::There(file) => file.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let names =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    #[test]
    fn what_was_there_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        let mut file = OutputFile::create(&path).unwrap();
        file.write_all(b"after").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        drop(file);
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), names_in(folder.path()).len()),
            ("before", 1)
        );
        let mut file = OutputFile::create(&path).unwrap();
        file.write_all(b"after").unwrap();
        file.commit().unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), names_in(folder.path()).len()),
            ("after", 1)
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o664,
            "who may write it stays"
        );
    }

    #[test]
    fn a_link_stays_one_and_a_pipe_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&path, "before").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut file = OutputFile::create(&link).unwrap();
        file.write_all(b"after").unwrap();
        file.commit().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "after");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let mut nowhere = OutputFile::create(Path::new("/dev/null")).unwrap();
        nowhere.write_all(b"something").unwrap();
        nowhere.commit().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn what_cannot_be_written_is_found_out_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        for (path, kind) in [("", io::ErrorKind::IsADirectory), ("none/file", io::ErrorKind::NotFound)] {
            let path = folder.path().join(path);
            assert_eq!(OutputFile::check(&path).unwrap_err().kind(), kind);
            assert_eq!(OutputFile::create(&path).unwrap_err().kind(), kind);
        }
        OutputFile::check(&folder.path().join("file")).unwrap();
        OutputFile::check(Path::new("/dev/null")).unwrap();
        assert!(names_in(folder.path()).is_empty(), "nothing is made for that");
    }
}
