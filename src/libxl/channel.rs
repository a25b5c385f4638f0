//! The two pipes between libxl and its save helper: messages out, answers in.
//!
//! They come as standard input and output. They are moved away from there first thing, so that nothing that is printed
//! can ever get between the messages, and moved back for the stock helper.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::stdio::{dup2_stdin, dup2_stdout, stderr, stdin, stdout};

use super::abort::Abort;

/// Where the pipes are moved to: away from the numbers that people and programs expect something else under.
const FIRST_NUMBER: i32 = 64;

/// Both pipes, libxl's ends at the other side.
#[derive(Debug)]
pub(super) struct Channel {
    answers: OwnedFd,
    messages: OwnedFd,
}

/// How waiting for an answer ended.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The migration is to end. The answer is still to come.
    Aborted,
    /// Libxl has closed the pipe, or it broke.
    Gone(io::Error),
}

impl Channel {
    /// Moves the pipes away from standard input and output. Standard input is empty from then on, and what is printed
    /// goes to standard error.
    pub fn take() -> io::Result<Self> {
        let answers = fcntl_dupfd_cloexec(stdin(), FIRST_NUMBER)?;
        let messages = fcntl_dupfd_cloexec(stdout(), FIRST_NUMBER)?;
        dup2_stdin(rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)?;
        dup2_stdout(stderr())?;
        Ok(Channel { answers, messages })
    }

    /// Makes them standard input and output again. This channel goes on working.
    pub fn give_back(&self) -> io::Result<()> {
        dup2_stdin(&self.answers)?;
        dup2_stdout(&self.messages)?;
        Ok(())
    }

    /// Over any two descriptors.
    #[cfg(test)]
    pub fn over(answers: OwnedFd, messages: OwnedFd) -> Self {
        Channel { answers, messages }
    }

    /// Writes a whole message, however long that takes: half of one would end the conversation.
    pub fn send(&self, mut frame: &[u8]) -> io::Result<()> {
        while !frame.is_empty() {
            match rustix::io::write(&self.messages, frame) {
                Ok(written) => frame = &frame[written..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether a message can be written without waiting. Also true when libxl is gone, which writing then finds out.
    pub fn has_room(&self) -> bool {
        // A pipe polls as writable while it has room for PIPE_BUF bytes, which is more than a message has.
        let mut room = [PollFd::new(&self.messages, PollFlags::OUT)];
        matches!(poll(&mut room, Some(&Timespec::default())), Ok(1))
    }

    /// Waits for the answer to what was asked; with `abort`, only until that is raised.
    pub fn answer(&self, abort: Option<&Abort>) -> Result<i32, NoAnswer> {
        let mut answer = [0; 4];
        let mut known = 0;
        while known < answer.len() {
            // One that has begun to arrive is waited for.
            if let Some(abort) = abort.filter(|_| known == 0) {
                self.await_answer_or(abort)?;
            }
            match rustix::io::read(&self.answers, &mut answer[known..]) {
                Ok(0) => return Err(NoAnswer::Gone(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => known += read,
                Err(Errno::INTR) => {}
                Err(error) => return Err(NoAnswer::Gone(error.into())),
            }
        }
        Ok(i32::from_ne_bytes(answer))
    }

    fn await_answer_or(&self, abort: &Abort) -> Result<(), NoAnswer> {
        loop {
            let mut both = [PollFd::new(&self.answers, PollFlags::IN), PollFd::new(abort, PollFlags::IN)];
            match poll(&mut both, None) {
                Ok(_) if !both[0].revents().is_empty() => return Ok(()),
                Ok(_) if !both[1].revents().is_empty() => return Err(NoAnswer::Aborted),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(NoAnswer::Gone(error.into())),
            }
        }
    }
}
