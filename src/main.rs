//! The `pagecast` program.

use std::ffi::OsString;
use std::process::ExitCode;

use pagecast::libxl;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    match libxl::recognise(&argv) {
        Some(invocation) => libxl::run(&argv, invocation, &mut libxl::save_domain),
        None => pagecast::cli::run(),
    }
}
