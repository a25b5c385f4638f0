//! The `pagecast` program.

use std::ffi::OsString;
use std::process::ExitCode;

use pagecast::libxl::{self, Abort, Libxl, SaveError, SaveReport, SaveRequest, dom0};

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    match libxl::recognise(&argv) {
        Some(invocation) => libxl::run(&argv, invocation, &mut save),
        None => pagecast::cli::run(),
    }
}

/// Leaves every domain to the stock helper: there is no Xen backend here that could save one.
fn save(_: &SaveRequest, _: &Libxl, _: &Abort) -> Result<SaveReport, SaveError> {
    dom0::check()?;
    Err(SaveError::NotOurs("this pagecast has no Xen backend".to_owned()))
}
