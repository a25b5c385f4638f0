//! The init of a guest in the Xen lab: writes pages, checks all that it has written, and says on its console how that
//! goes. It is the embedded guest's machine (`pagecast::guest::arena`) without the process around it.
//!
//! It takes its settings as `name=value` arguments, which the kernel hands to init from behind `--` on its command line.
//! It needs no file system mounted, and runs as an ordinary process as well.
//!
//! Lines, each beginning with `lab-guest:`. Times are in milliseconds; `docs/xenlab.md` says what each field means:
//!
//! ```text
//! lab-guest: ready pages=16384 owned=12271 workload=kv rate=1000 seed=1
//! lab-guest: seq=7 t_ms=7012 writes=19270 checked=7401 errors=0 silence_ms=12 awake_silence_ms=12 longest_silence_ms=40 …
//! lab-guest: error page 0x2a9 is an older version (found at operation 12345)
//! lab-guest: full-check pages=16384 errors=0 took_ms=310 suspends=1
//! ```

mod clocks;
mod guest;
mod settings;

use std::process::ExitCode;

fn main() -> ExitCode {
    let run = settings::Settings::parse(std::env::args().skip(1)).map_err(|error| error.to_string());
    match run.and_then(|settings| guest::run(&settings).map_err(|error| error.to_string())) {
        Ok(errors) => ExitCode::from(u8::from(errors > 0)),
        Err(error) => {
            pagecast::sys::console::say(format_args!("lab-guest: {error}"));
            ExitCode::from(2)
        }
    }
}
