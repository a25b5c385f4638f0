//! Words to whoever reads along. Nobody may be reading any more, least of all in a process that outlives the one it was
//! started by: that must never be what ends a migration, as std's `eprintln!` would by its panic.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

/// Why a line was not written.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// A line on standard output.
pub fn say(line: Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        let _ = LOST.set(error);
    }
}

/// A line on standard error.
pub fn complain(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Why something that was said is not written down, if that is so. That nobody reads on does not count.
pub fn lost() -> Option<&'static io::Error> {
    LOST.get().filter(|error| error.kind() != ErrorKind::BrokenPipe)
}
