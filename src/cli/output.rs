//! Files that a subcommand was told to write.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Failure;
use crate::report::plot::{Figure, PlotError};
use crate::sys::output_file::OutputFile;

/// A file to be written at the end. Whether it can be is found out at the start.
pub struct Output {
    path: PathBuf,
}

impl Output {
    /// Of the file at `path`, which is left as it is until there is something to write, and which is none of `read`.
    pub fn create(path: &Path, read: &[PathBuf]) -> Result<Self, Failure> {
        let place = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        if place(path).is_some_and(|there| read.iter().any(|read| place(read) == Some(there))) {
            return Err(Failure::usage(format!(
                "{} is to be read and would be overwritten; choose another name",
                path.display()
            )));
        }
        OutputFile::check(path).map_err(|error| cannot_write(path, &error))?;
        Ok(Output { path: path.to_owned() })
    }

    /// Of a picture.
    pub fn picture(path: &Path) -> Result<Self, Failure> {
        Figure::check_name(path).map_err(Failure::usage)?;
        Output::create(path, &[])
    }

    /// Writes it.
    pub fn write(self, text: &[u8]) -> Result<(), Failure> {
        let written = OutputFile::create(&self.path).and_then(|mut file| {
            file.write_all(text)?;
            file.commit()
        });
        written.map_err(|error| cannot_write(&self.path, &error))
    }

    /// Writes the picture.
    pub fn draw(self, figure: Result<Figure, PlotError>) -> Result<(), Failure> {
        let text = figure.map_err(Failure::failed)?.text(&self.path);
        self.write(text.as_bytes())
    }
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("cannot write {}: {error}; is the folder there and writable?", path.display()))
}
