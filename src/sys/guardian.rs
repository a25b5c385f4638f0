//! A guardian: a child of this process that lets stopped processes run on when this process dies without having done so.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use libc::c_uint;

use super::signals;

/// The most processes that a guardian minds.
pub const MAX_WARDS: usize = 4096;

/// Told in place of a process: all run on again.
const FORGET: i32 = 0;

/// Minds the processes that it is told of. It lives in a session of its own with every signal blocked, and ends when this is
/// dropped.
pub struct Guardian {
    pipe: std::fs::File,
    child: i32,
}

impl Guardian {
    /// Starts one that minds nobody yet.
    pub fn start() -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let child = signals::with_all_blocked(|| {
            // SAFETY: the child runs `mind`, which neither allocates nor locks nor panics, and leaves by _exit.
            match unsafe { libc::fork() } {
                0 => {
                    mind(&read);
                    // SAFETY: ends the process without running anything of its parent's.
                    unsafe { libc::_exit(0) }
                }
                child if child < 0 => Err(io::Error::last_os_error()),
                child => Ok(child),
            }
        })??;
        Ok(Guardian { pipe: write.into(), child })
    }

    /// To be told before a process is stopped.
    pub fn mind(&mut self, pid: i32) -> io::Result<()> {
        self.pipe.write_all(&pid.to_ne_bytes())
    }

    /// To be told when all run on.
    pub fn forget(&mut self) -> io::Result<()> {
        self.pipe.write_all(&FORGET.to_ne_bytes())
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Ok(nothing) =
            rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())
        {
            // The end of the pipe is what ends it.
            self.pipe = nothing.into();
            // SAFETY: waits for one child by its number and stores nothing.
            unsafe { libc::waitpid(self.child, std::ptr::null_mut(), 0) };
        }
    }
}

/// The guardian's whole life.
fn mind(pipe: &OwnedFd) {
    let own = pipe.as_raw_fd() as c_uint;
    // SAFETY: no pointers but a string literal. What is closed are copies, of which this process uses none.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"pagecast-guard".as_ptr());
        libc::close_range(3, own.saturating_sub(1), 0);
        libc::close_range(own + 1, c_uint::MAX, 0);
    }
    let mut wards = [0i32; MAX_WARDS];
    let mut count = 0;
    loop {
        let mut word = [0u8; 4];
        // Writes of four bytes to a pipe arrive whole.
        match rustix::io::read(pipe, &mut word) {
            Ok(4) => {}
            Err(rustix::io::Errno::INTR) => continue,
            _ => break,
        }
        match i32::from_ne_bytes(word) {
            FORGET => count = 0,
            pid if count < MAX_WARDS => {
                wards[count] = pid;
                count += 1;
            }
            _ => {}
        }
    }
    for pid in wards.iter().take(count) {
        // SAFETY: sends a signal and takes no pointers. Numbers are positive: nothing else was ever stopped.
        unsafe { libc::kill(*pid, libc::SIGCONT) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::process::proc::Stat;
    use rustix::process::{Pid, Signal, kill_process};

    #[test]
    fn whoever_is_minded_runs_on_when_the_minder_goes() {
        let mut target = std::process::Command::new("sleep").arg("100").spawn().expect("sleep");
        let pid = Pid::from_child(&target);
        let state = || Stat::of(pid.as_raw_nonzero().get()).unwrap().state;
        let stopped = |wanted: bool| {
            let since = std::time::Instant::now();
            while (state() == b'T') != wanted {
                assert!(since.elapsed().as_secs() < 30, "state {}", state() as char);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        for forgets in [false, true] {
            let mut guardian = Guardian::start().unwrap();
            guardian.mind(pid.as_raw_nonzero().get()).unwrap();
            kill_process(pid, Signal::STOP).unwrap();
            stopped(true);
            if forgets {
                guardian.forget().unwrap();
            }
            drop(guardian);
            // Somebody else's stop is no concern of a guardian that was told to forget.
            stopped(forgets);
        }
        let _ = target.kill();
        let _ = target.wait();
    }
}
