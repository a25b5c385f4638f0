//! Processes that a subcommand starts for itself: other pagecasts on this host.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};

use super::Failure;

/// A folder for sockets that only this user can look into, and that goes when it is dropped, or when the process is
/// interrupted again.
pub struct Folder(pub PathBuf);

/// The folders that there are.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn folders() -> MutexGuard<'static, Vec<PathBuf>> {
    FOLDERS.lock().expect("nobody panics with the folders in hand")
}

/// Removes all folders and then does what is to be done before another can be made.
pub fn remove_folders(then: impl FnOnce()) {
    let mut folders = folders();
    for folder in folders.drain(..) {
        let _ = std::fs::remove_dir_all(folder);
    }
    then();
}

impl Folder {
    /// Makes one.
    pub fn new() -> Result<Self, Failure> {
        let failed = |error: &dyn std::fmt::Display| {
            Failure::failed(format!(
                "cannot make a folder for sockets in {}: {error}",
                std::env::temp_dir().display()
            ))
        };
        let name = crate::transport::session::new_migration().map_err(|error| failed(&error))?;
        let path = std::env::temp_dir().join(format!("pagecast-{}", &name[..12]));
        let mut folders = folders();
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|error| failed(&error))?;
        folders.push(path.clone());
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let mut folders = folders();
        folders.retain(|folder| folder != &self.0);
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process of ours that ends when this is dropped.
pub struct Process(pub Child);

impl Process {
    /// Starts one in a process group of its own.
    pub fn start(command: &mut Command) -> Result<Self, Failure> {
        // Ctrl-C is for the migrator: a guest must not die of it.
        let child = command.stdin(Stdio::null()).process_group(0).spawn();
        child.map(Process).map_err(|error| Failure::failed(format!("cannot start another pagecast: {error}")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// This program, to be run with a subcommand that ends when this process does.
pub fn pagecast(subcommand: &str) -> Result<Command, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot tell where this program is: {error}")))?;
    let mut command = Command::new(program);
    command.arg(subcommand).arg("--die-with-parent");
    Ok(command)
}

/// Starts a receiver for what this process sends, a guest whose control socket will be `socket`, and returns where it listens.
pub fn start_receiver(socket: &Path, capture: Option<&Path>) -> Result<(Process, String), Failure> {
    let mut command = pagecast("receive")?;
    command.args(["--source-is-parent", "--listen", "127.0.0.1:0", "--socket"]).arg(socket);
    command.stdout(Stdio::piped());
    if let Some(capture) = capture {
        command.arg("--capture").arg(capture);
    }
    let mut process = Process::start(&mut command)?;
    let mut line = String::new();
    if let Some(output) = process.0.stdout.take() {
        let _ = BufReader::new(output).read_line(&mut line);
    }
    match line.trim().strip_prefix("listening on ") {
        Some(address) => Ok((process, address.to_owned())),
        None => Err(Failure::failed("the receiver did not start")),
    }
}
