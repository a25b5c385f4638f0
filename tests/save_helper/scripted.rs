//! A saver that does what the variable `SCRIPT` says.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use pagecast::libxl::{Abort, Level, Libxl, SaveError, SaveReport, SaveRequest};
use serde_json::json;

/// What it writes to the stream once everything is undone that it did to the domain.
pub const UNDONE: &str = "undone";

/// What it writes to the stream otherwise.
pub const DATA: &str = "domain data";

/// The script of this process.
pub fn save(request: &SaveRequest, libxl: &Libxl, abort: &Abort) -> Result<SaveReport, SaveError> {
    match std::env::var("SCRIPT").as_deref() {
        Ok("whole") => whole(request, libxl),
        Ok("precopy") => {
            libxl.switch_qemu_logdirty(request.domid, true)?;
            while !abort.is_raised() {
                libxl.progress("memory", 1, 2);
                std::thread::sleep(Duration::from_millis(5));
            }
            write(request, UNDONE);
            Err(SaveError::failed(libc::EINTR, abort.reason()))
        }
        Ok("panic") => {
            libxl.switch_qemu_logdirty(request.domid, true)?;
            panic!("of {} eggs", 2);
        }
        Ok("not ours") => Err(SaveError::NotOurs("it is a PV guest".to_owned())),
        Ok("too late") => {
            libxl.suspend()?;
            Err(SaveError::NotOurs("it is a PV guest".to_owned()))
        }
        other => Err(SaveError::failed(libc::EINVAL, format!("no script {other:?}"))),
    }
}

/// What a real save does, in that order.
fn whole(request: &SaveRequest, libxl: &Libxl) -> Result<SaveReport, SaveError> {
    libxl.log(Level::Detail, "begins");
    // Not a word of this may get between the messages.
    println!("a stray line");
    libxl.switch_qemu_logdirty(request.domid, true)?;
    libxl.progress("memory", 1, 2);
    match libxl.suspend() {
        Ok(true) => {}
        Ok(false) => return Err(SaveError::failed(libc::ETIMEDOUT, "the guest was not suspended")),
        Err(error) => {
            write(request, UNDONE);
            return Err(error.into());
        }
    }
    write(request, DATA);
    Ok(SaveReport { report: json!({ "event": "report" }), summary: "first line\nlast line\n".to_owned() })
}

fn write(request: &SaveRequest, text: &str) {
    let stream = request.stream.as_fd().try_clone_to_owned().expect("a descriptor");
    std::fs::File::from(stream).write_all(text.as_bytes()).expect("it is read");
}
