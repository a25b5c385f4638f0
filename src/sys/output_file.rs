//! Files that programs leave to their users. What was there before stays until the new one is whole, and for good if it never is.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

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

impl OutputFile {
    /// Begins the file that will be at `path`. All that can be wrong with the place is found out now.
    pub fn create(path: &Path) -> io::Result<Self> {
        let (path, mode) = match fs::metadata(path) {
            Ok(there) if there.is_file() => {
                // Whoever may not write to it may not replace it either.
                File::options().write(true).open(path)?;
                (fs::canonicalize(path)?, there.permissions().mode() & 0o777)
            }
            Ok(there) if there.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(_) => {
                let place = Place::There(File::options().write(true).open(path)?);
                return Ok(OutputFile { path: path.to_owned(), place });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_owned(), 0o666),
            Err(error) => return Err(error),
        };
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::metadata(folder)?;
        let beside = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(fs::Permissions::from_mode(mode))
            .tempfile_in(folder)
            // What it says names a file that nobody has heard of.
            .map_err(|error| io::Error::from(error.kind()))?;
        Ok(OutputFile { path, place: Place::Beside(beside) })
    }

    /// It is whole.
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
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
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
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640, "who may read it stays");
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
        let kind = |path: &Path| OutputFile::create(path).unwrap_err().kind();
        assert_eq!(kind(folder.path()), io::ErrorKind::IsADirectory);
        assert_eq!(kind(&folder.path().join("none/file")), io::ErrorKind::NotFound);
    }
}
