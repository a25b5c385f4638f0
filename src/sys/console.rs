//! Words to whoever reads along. Nobody may be reading any more, least of all in a process that outlives the one it was
//! started by: that must never be what ends a migration, as std's `eprintln!` would by its panic.

use std::fmt::Arguments;
use std::io::Write;

/// A line on standard output.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line on standard error.
pub fn complain(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
