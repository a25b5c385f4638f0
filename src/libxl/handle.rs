//! Libxl as whoever saves a domain sees it: a log, a display of progress, and the two things that it does for a saver.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::abort::Abort;
use super::channel::{Channel, NoAnswer};
use super::messages::{Level, Message};

/// What stands before each line that xl shows.
pub const CONTEXT: &str = "pagecast";

/// The least time between two messages of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Why libxl did not do something.
#[derive(Debug, thiserror::Error)]
pub enum LibxlError {
    /// It has died, or closed the pipes.
    #[error("libxl does not answer any more ({0}); has xl been killed?")]
    Gone(String),
    /// The migration is to end.
    #[error("{reason} while libxl was to {what}")]
    Aborted {
        /// Who wants that.
        reason: String,
        /// What it was asked for.
        what: &'static str,
    },
    /// It tried and could not.
    #[error("libxl could not {0}; what it logged says why")]
    Failed(&'static str),
    /// It has been told that all is over.
    #[error("libxl was asked to {0} after the end")]
    Completed(&'static str),
}

/// The conversation with libxl. It may be used from any thread; one that asks for something holds the others up until libxl
/// answers, since there may be only one question at a time.
///
/// A question that an abort cuts short stays asked. Libxl counts on its answer being read: if this process ended, or said
/// that it was done, while libxl works on a question, libxl would afterwards answer into a closed pipe and complete the
/// operation a second time (`libxl__xc_domain_saverestore_async_callback_done`). So the next question, if only that of
/// `complete`, first waits for the answer that is still to come.
#[derive(Debug)]
pub struct Libxl {
    talk: Mutex<Talk>,
    abort: Abort,
}

#[derive(Debug)]
struct Talk {
    channel: Channel,
    /// An answer is still to come.
    owed: bool,
    /// Something else than a line for the log was said.
    engaged: bool,
    /// The domain that qemu may be logging for.
    logdirty: Option<u16>,
    gone: bool,
    completed: bool,
    progress: Option<(String, Instant)>,
}

impl Libxl {
    pub(super) fn new(channel: Channel, abort: &Abort) -> Self {
        let talk = Talk {
            channel,
            owed: false,
            engaged: false,
            logdirty: None,
            gone: false,
            completed: false,
            progress: None,
        };
        Libxl { talk: Mutex::new(talk), abort: abort.clone() }
    }

    /// Adds a line to libxl's log. Never fails: if libxl is gone, the abort is raised.
    pub fn log(&self, level: Level, text: &str) {
        self.say(&Message::Log { level, errno: None, context: CONTEXT, text });
    }

    /// Has xl show how far something is: percents of `total`, and a line of its own for each 5 more, or less. At most a few
    /// in a second go out, and none while xl does not read.
    pub fn progress(&self, doing_what: &str, done: u64, total: u64) {
        let mut talk = self.talk();
        let total = total.max(1);
        let done = done.min(total);
        let soon = talk.progress.as_ref().is_some_and(|(before, at)| {
            before == doing_what && done < total && at.elapsed() < PROGRESS_INTERVAL
        });
        if soon || talk.completed || !talk.channel.has_room() {
            return;
        }
        talk.progress = Some((doing_what.to_owned(), Instant::now()));
        talk.engaged = true;
        let sent = talk.send(&Message::Progress { context: CONTEXT, doing_what, done, total });
        self.notice(sent.is_err());
    }

    /// Has libxl suspend the guest; false if it could not. This can take two minutes, and an abort ends it sooner; libxl may
    /// then suspend the guest all the same, and lets it run again once the save has failed.
    pub fn suspend(&self) -> Result<bool, LibxlError> {
        let answer = self.ask(&Message::Suspend, "suspend the guest", Some(&self.abort))?;
        Ok(answer == 1)
    }

    /// Has qemu log what it writes into guest memory, or no longer. What is switched on is switched off by the end at the
    /// latest. An abort cuts short switching on only.
    pub fn switch_qemu_logdirty(&self, domid: u16, enable: bool) -> Result<(), LibxlError> {
        let what = if enable { "switch qemu's dirty logging on" } else { "switch qemu's dirty logging off" };
        if enable {
            // Before it is asked: whatever becomes of that, it has to be switched off again.
            self.talk().logdirty = Some(domid);
        }
        let message = Message::SwitchQemuLogdirty { domid: domid.into(), enable };
        let answer = self.ask(&message, what, Some(&self.abort).filter(|_| enable))?;
        if !enable {
            self.talk().logdirty = None;
        }
        if answer == 0 { Ok(()) } else { Err(LibxlError::Failed(what)) }
    }

    /// Switches qemu's dirty logging off if it may be on.
    pub(super) fn end_logdirty(&self) -> Result<(), LibxlError> {
        let domid = self.talk().logdirty;
        domid.map_or(Ok(()), |domid| self.switch_qemu_logdirty(domid, false))
    }

    /// Tells libxl how it ended and reads its answer. Nothing can be said after that.
    pub(super) fn complete(&self, retval: i32, errno: i32) -> Result<(), LibxlError> {
        let result = self.ask(&Message::Complete { retval, errno }, "take note of the end", None);
        self.talk().completed = true;
        result.map(drop)
    }

    /// Whether anything but lines for the log was said. The stock helper can then no longer be put in this one's place.
    pub(super) fn is_engaged(&self) -> bool {
        self.talk().engaged
    }

    /// Makes the pipes standard input and output again, for the stock helper.
    pub(super) fn give_back(&self) -> std::io::Result<()> {
        self.talk().channel.give_back()
    }

    fn say(&self, message: &Message) {
        let mut talk = self.talk();
        if talk.completed {
            return;
        }
        let sent = talk.send(message);
        self.notice(sent.is_err());
    }

    fn ask(&self, message: &Message, what: &'static str, abort: Option<&Abort>) -> Result<i32, LibxlError> {
        let mut talk = self.talk();
        if talk.completed {
            return Err(LibxlError::Completed(what));
        }
        if let Some(abort) = abort.filter(|abort| abort.is_raised()) {
            return Err(LibxlError::Aborted { reason: abort.reason(), what });
        }
        talk.engaged = true;
        let mut exchange = || {
            talk.settle()?;
            talk.send(message)?;
            talk.owed = true;
            let answer = talk.answer(abort)?;
            Ok(answer)
        };
        exchange().map_err(|error| match error {
            NoAnswer::Aborted => LibxlError::Aborted { reason: self.abort.reason(), what },
            NoAnswer::Gone(error) => {
                self.notice(true);
                LibxlError::Gone(error.to_string())
            }
        })
    }

    /// Without libxl there is nobody to migrate for.
    fn notice(&self, gone: bool) {
        if gone {
            self.abort.raise_for_loss_of_libxl();
        }
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        // Whoever panicked did not do so between the two halves of a message.
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Talk {
    fn send(&mut self, message: &Message) -> Result<(), NoAnswer> {
        if self.gone {
            return Err(NoAnswer::Gone(std::io::ErrorKind::BrokenPipe.into()));
        }
        let sent = self.channel.send(&message.encode());
        sent.map_err(|error| {
            self.gone = true;
            NoAnswer::Gone(error)
        })
    }

    /// Waits for the answer to a question that an abort cut short.
    fn settle(&mut self) -> Result<(), NoAnswer> {
        if self.owed { self.answer(None).map(drop) } else { Ok(()) }
    }

    fn answer(&mut self, abort: Option<&Abort>) -> Result<i32, NoAnswer> {
        let answer = self.channel.answer(abort);
        match &answer {
            Ok(_) => self.owed = false,
            Err(NoAnswer::Aborted) => {}
            Err(NoAnswer::Gone(_)) => (self.owed, self.gone) = (false, true),
        }
        answer
    }
}

#[cfg(test)]
mod tests;
