//! Signals as events: a thread waits for them with signalfd, and no handler runs anywhere.
//!
//! The signals are blocked in the thread that starts the watch and in all threads that it starts later, so they arrive
//! the same whether they were blocked, ignored or at their default before: a blocked signal stays pending, and a signalfd
//! reads it. No call of any thread is interrupted by one.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// A watch over some signals. Dropping it changes nothing: signals stay blocked to the end of the process.
pub struct SignalWatch {
    before: libc::sigset_t,
    stop: OwnedFd,
    thread: JoinHandle<()>,
}

impl SignalWatch {
    /// Calls `caught` with the number of the first of `signals` that arrives. Later ones stay pending.
    pub fn start(signals: &[i32], caught: impl FnOnce(i32) + Send + 'static) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let mut watched = empty_set();
        for signal in signals {
            // SAFETY: the set is initialised; an invalid number is an error that the set does not notice.
            unsafe { libc::sigaddset(&mut watched, *signal) };
        }
        let arrivals = arrivals(&watched)?;
        let before = change_mask(libc::SIG_BLOCK, &watched)?;
        let body = move || {
            if let Some(signal) = wait(&arrivals, &stopped) {
                caught(signal);
            }
        };
        match std::thread::Builder::new().name("signals".to_owned()).spawn(body) {
            Ok(thread) => Ok(SignalWatch { before, stop, thread }),
            Err(error) => {
                change_mask(libc::SIG_SETMASK, &before)?;
                Err(error)
            }
        }
    }

    /// Ends the watch and gives the mask back as it was, which lets pending signals through. To be called by the thread
    /// that started it.
    pub fn end(self) -> io::Result<()> {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes())?;
        let _ = self.thread.join();
        change_mask(libc::SIG_SETMASK, &self.before).map(drop)
    }
}

/// The first signal that arrives, or None when it is time to stop.
fn wait(arrivals: &OwnedFd, stop: &OwnedFd) -> Option<i32> {
    loop {
        let mut both = [PollFd::new(arrivals, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut both, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return None,
        }
        let mut arrival = [0u8; size_of::<libc::signalfd_siginfo>()];
        if both[0].revents().contains(PollFlags::IN)
            && rustix::io::read(arrivals, &mut arrival) == Ok(arrival.len())
        {
            // ssi_signo is the first field.
            let signal = u32::from_ne_bytes([arrival[0], arrival[1], arrival[2], arrival[3]]);
            return Some(signal as i32);
        }
        if !both[1].revents().is_empty() {
            return None;
        }
    }
}

fn empty_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, for which zeroes are a value, and sigemptyset initialises it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        set
    }
}

fn arrivals(watched: &libc::sigset_t) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised and outlives the call.
    let number = unsafe { libc::signalfd(-1, watched, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is that of a descriptor that was just made, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Calls `work` with every signal blocked in this thread, and gives the mask back as it was: a child that `work` starts keeps
/// them blocked.
pub fn with_all_blocked<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    let mut all = empty_set();
    // SAFETY: the set is initialised.
    unsafe { libc::sigfillset(&mut all) };
    let before = change_mask(libc::SIG_SETMASK, &all)?;
    let result = work();
    change_mask(libc::SIG_SETMASK, &before)?;
    Ok(result)
}

fn change_mask(how: i32, set: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut before = empty_set();
    // SAFETY: both sets are initialised and outlive the call.
    match unsafe { libc::pthread_sigmask(how, set, &mut before) } {
        0 => Ok(before),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    // That a signal arrives is tested in tests/save_helper: this test program's other threads do not block it.
    use super::*;

    /// Whether the calling thread blocks a signal.
    fn blocks(signal: i32) -> bool {
        let mask = change_mask(libc::SIG_BLOCK, &empty_set()).unwrap();
        // SAFETY: the set is initialised.
        unsafe { libc::sigismember(&mask, signal) == 1 }
    }

    #[test]
    fn all_signals_are_blocked_for_a_while_only() {
        assert!(with_all_blocked(|| blocks(libc::SIGUSR2) && blocks(libc::SIGTERM)).unwrap());
        assert!(!blocks(libc::SIGUSR2));
    }

    #[test]
    fn signals_are_blocked_until_a_watch_is_ended_and_then_as_before() {
        assert!(!blocks(libc::SIGUSR1));
        let watch = SignalWatch::start(&[libc::SIGUSR1], |_| {}).unwrap();
        assert!(blocks(libc::SIGUSR1));
        watch.end().unwrap();
        assert!(!blocks(libc::SIGUSR1));
    }
}
