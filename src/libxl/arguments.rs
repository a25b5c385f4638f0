//! What libxl runs its save helper with, and which of it pagecast does itself.
//!
//! libxl_save_callout.c, the same from Xen 4.17 to 4.22: `--save-domain STREAM_FD RECV_FD DOMID FLAGS CALLBACKS
//! STREAM_TYPE`, or `--restore-domain` and nine numbers. Whatever is not exactly a plain save goes to the stock helper,
//! malformed lines included: it then says what it always says.

use std::ffi::{OsStr, OsString};
use std::str::FromStr;

use bitflags::bitflags;

bitflags! {
    /// How to save: XCFLAGS_* of xenguest.h.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// The guest runs while its memory is sent.
        const LIVE = 1;
        /// Send everything once more at the end, for the receiver to compare.
        const DEBUG = 2;
    }
}

bitflags! {
    /// What libxl can be asked for: bit n is message n.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Callbacks: u32 {
        /// Suspending the guest.
        const SUSPEND = 1 << 3;
        /// Having qemu log what it writes into guest memory.
        const SWITCH_QEMU_LOGDIRTY = 1 << 7;
    }
}

/// The first domain number that is Xen's own (DOMID_FIRST_RESERVED of xen.h).
const FIRST_RESERVED_DOMID: u16 = 0x7ff0;

/// A save that is pagecast's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveArguments {
    /// Where the stream goes: a pipe, a socket or a file, open under this number.
    pub stream_fd: i32,
    /// The domain.
    pub domid: u16,
    /// How to save.
    pub flags: Flags,
    /// What libxl can be asked for.
    pub callbacks: Callbacks,
}

/// Being run as libxl's save helper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// To save a domain.
    Save(SaveArguments),
    /// For something that is left to the stock helper.
    Delegate {
        /// What that is.
        why: String,
    },
}

/// Tells whether `argv`, the program's name included, is libxl's, and what it asks for. None: it is a person's.
pub fn recognise(argv: &[OsString]) -> Option<Invocation> {
    let (mode, rest) = argv.get(1..)?.split_first()?;
    let why = match mode.to_str()? {
        "--save-domain" => match save(rest) {
            Ok(arguments) => return Some(Invocation::Save(arguments)),
            Err(why) => why,
        },
        "--restore-domain" => "it restores a domain".to_owned(),
        _ => return None,
    };
    Some(Invocation::Delegate { why })
}

fn save(rest: &[OsString]) -> Result<SaveArguments, String> {
    let [stream_fd, _recv_fd, domid, flags, callbacks, stream_type] = rest else {
        return Err(format!("--save-domain has {} arguments where 6 are known", rest.len()));
    };
    let stream_type: u32 = number("stream type", stream_type)?;
    match stream_type {
        0 => {}
        1 => return Err("it saves for Remus".to_owned()),
        2 => return Err("it saves for COLO".to_owned()),
        other => return Err(format!("stream type {other} is not known")),
    }
    let flags: u32 = number("flags", flags)?;
    let flags = Flags::from_bits(flags).ok_or_else(|| format!("flags {flags} are not all known"))?;
    if flags.contains(Flags::DEBUG) {
        return Err("it saves with --debug".to_owned());
    }
    let callbacks = Callbacks::from_bits_truncate(number("callbacks", callbacks)?);
    if !callbacks.is_all() {
        return Err("libxl does not offer to suspend the guest and to switch qemu's dirty logging".to_owned());
    }
    let domid: u16 = number("domain", domid)?;
    if domid == 0 || domid >= FIRST_RESERVED_DOMID {
        return Err(format!("{domid} is no guest's number"));
    }
    let stream_fd: i32 = number("stream descriptor", stream_fd)?;
    if stream_fd < 3 {
        return Err(format!("the stream is descriptor {stream_fd}"));
    }
    Ok(SaveArguments { stream_fd, domid, flags, callbacks })
}

fn number<T: FromStr>(what: &str, text: &OsStr) -> Result<T, String> {
    let digits = text.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|text| text.parse().ok()).ok_or_else(|| format!("{what} {text:?} makes no sense"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<Invocation> {
        let argv: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        recognise(&argv)
    }

    #[test]
    fn the_lines_that_libxl_was_seen_to_write_are_saves() {
        for (line, stream_fd, flags) in [
            ("pagecast --save-domain 15 11 1 1 136 0", 15, Flags::LIVE),
            ("pagecast --save-domain 14 11 1 0 136 0", 14, Flags::empty()),
            ("pagecast --save-domain 14 4294967295 1 0 136 0", 14, Flags::empty()),
            ("pagecast --save-domain 14 -1 1 0 136 0", 14, Flags::empty()),
        ] {
            let arguments = SaveArguments { stream_fd, domid: 1, flags, callbacks: Callbacks::all() };
            assert_eq!(of(line), Some(Invocation::Save(arguments)), "{line}");
        }
    }

    #[test]
    fn everything_else_of_libxl_goes_to_the_stock_helper_with_the_reason() {
        for (line, says) in [
            ("pagecast --restore-domain 11 20 2 1 0 2 0 768 0", "restores"),
            ("pagecast --restore-domain", "restores"),
            ("pagecast --save-domain", "0 arguments"),
            ("pagecast --save-domain 15 11 1 1 136", "5 arguments"),
            ("pagecast --save-domain 15 11 1 1 136 0 0", "7 arguments"),
            ("pagecast --save-domain 15 11 1 1 136 1", "Remus"),
            ("pagecast --save-domain 15 11 1 1 136 2", "COLO"),
            ("pagecast --save-domain 15 11 1 1 136 3", "stream type 3"),
            ("pagecast --save-domain 15 11 1 3 136 0", "--debug"),
            ("pagecast --save-domain 15 11 1 4 136 0", "flags 4"),
            ("pagecast --save-domain 15 11 1 1 8 0", "does not offer"),
            ("pagecast --save-domain 15 11 0 1 136 0", "no guest's number"),
            ("pagecast --save-domain 15 11 32752 1 136 0", "no guest's number"),
            ("pagecast --save-domain 15 11 70000 1 136 0", "makes no sense"),
            ("pagecast --save-domain 1 11 1 1 136 0", "descriptor 1"),
            ("pagecast --save-domain +15 11 1 1 136 0", "makes no sense"),
            ("pagecast --save-domain 15 11 1 live 136 0", "makes no sense"),
            ("pagecast --save-domain 15 11 1 1 136 ", "makes no sense"),
        ] {
            match of(line) {
                Some(Invocation::Delegate { why }) => assert!(why.contains(says), "{line}: {why}"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_a_person_types_is_not_libxls() {
        for line in
            ["pagecast", "pagecast demo", "pagecast --help", "pagecast demo --save-domain 15 11 1 1 136 0"]
        {
            assert_eq!(of(line), None, "{line}");
        }
    }
}
