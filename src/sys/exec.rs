//! Becoming another program, with everything passed on as it was received.

use std::ffi::{CString, OsStr, OsString, c_char};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Runs `program` in place of this one, with `argv` (its name first) and this process's environment, descriptors and
/// signal mask. Returns only if that fails, and then why.
///
/// Not `std::process::Command`: that empties the signal mask. SIGPIPE goes back to its default, which Rust's start-up
/// took away; it is what libxl starts its helper with (libxl_exec.c).
pub fn exec(program: &Path, argv: &[OsString]) -> io::Error {
    let text = |text: &OsStr| CString::new(text.as_bytes());
    let strings: Result<Vec<CString>, _> = argv.iter().map(|argument| text(argument)).collect();
    let (Ok(program), Ok(strings)) = (text(program.as_os_str()), strings) else {
        return io::ErrorKind::InvalidInput.into();
    };
    let mut pointers: Vec<*const c_char> = strings.iter().map(|string| string.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the path and every argument are NUL-terminated and outlive the call, and the array of arguments ends with
    // a null pointer. Setting SIGPIPE's disposition takes no pointers.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::execv(program.as_ptr(), pointers.as_ptr());
        let error = io::Error::last_os_error();
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        error
    }
}

#[cfg(test)]
mod tests {
    // What gets as far as changing SIGPIPE is tested in tests/save_helper, in a process of its own.
    use super::*;

    #[test]
    fn what_no_program_can_be_given_is_an_error() {
        let error = exec(Path::new("/bin/true"), &["with\0inside".into()]);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
