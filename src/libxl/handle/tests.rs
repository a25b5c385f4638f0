//! Tests of the conversation with libxl, with a libxl that is two pipes.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Duration;

use super::*;

/// Libxl's ends of the pipes.
struct Peer {
    messages: File,
    answers: Option<File>,
}

impl Peer {
    fn expect(&mut self, message: &Message) {
        let wanted = message.encode();
        let mut found = vec![0; wanted.len()];
        self.messages.read_exact(&mut found).unwrap();
        assert_eq!(found, wanted, "{message:?}");
    }

    fn answer(&mut self, answer: i32) {
        self.answers.as_mut().unwrap().write_all(&answer.to_ne_bytes()).unwrap();
    }

    fn expect_and_answer(&mut self, message: &Message, answer: i32) {
        self.expect(message);
        self.answer(answer);
    }
}

fn conversation() -> (Libxl, Peer, Abort) {
    let abort = Abort::new().unwrap();
    let (answers, to_answer) = rustix::pipe::pipe().unwrap();
    let (to_read, messages) = rustix::pipe::pipe().unwrap();
    let peer = Peer { messages: to_read.into(), answers: Some(to_answer.into()) };
    (Libxl::new(Channel::over(answers, messages), &abort), peer, abort)
}

fn switch(enable: bool) -> Message<'static> {
    Message::SwitchQemuLogdirty { domid: 5, enable }
}

#[test]
fn every_question_gets_its_answer() {
    let (libxl, mut peer, _abort) = conversation();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            peer.expect(&Message::Log {
                level: Level::Info,
                errno: None,
                context: "pagecast",
                text: "begins",
            });
            peer.expect_and_answer(&switch(true), 0);
            peer.expect_and_answer(&Message::Suspend, 1);
            peer.expect_and_answer(&Message::Suspend, 0);
            peer.expect_and_answer(&switch(false), -1);
            peer.expect_and_answer(&Message::Complete { retval: -1, errno: 5 }, 0);
        });
        libxl.log(Level::Info, "begins");
        assert!(!libxl.is_engaged(), "a line for the log changes nothing");
        libxl.switch_qemu_logdirty(5, true).unwrap();
        assert!(libxl.is_engaged());
        assert!(libxl.suspend().unwrap());
        assert!(!libxl.suspend().unwrap());
        let error = libxl.switch_qemu_logdirty(5, false).unwrap_err().to_string();
        assert!(error.contains("could not switch qemu's dirty logging off"), "{error}");
        libxl.complete(-1, 5).unwrap();
    });
}

#[test]
fn an_abort_ends_the_wait_and_the_answer_that_is_still_to_come_is_waited_for_by_the_next_question() {
    let (libxl, mut peer, abort) = conversation();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            peer.expect_and_answer(&switch(true), 0);
            peer.expect(&Message::Suspend);
            abort.raise_for_loss_of_libxl();
            std::thread::sleep(Duration::from_millis(20));
            // Nothing else is asked before this answer is there.
            peer.answer(1);
            peer.expect_and_answer(&switch(false), 0);
            peer.expect_and_answer(&Message::Complete { retval: -1, errno: libc::EINTR }, 0);
        });
        libxl.switch_qemu_logdirty(5, true).unwrap();
        assert!(matches!(libxl.suspend(), Err(LibxlError::Aborted { .. })));
        assert!(matches!(libxl.suspend(), Err(LibxlError::Aborted { .. })), "it is not even asked");
        libxl.end_logdirty().unwrap();
        libxl.complete(-1, libc::EINTR).unwrap();
    });
}

#[test]
fn dirty_logging_that_may_be_on_is_switched_off_and_no_other() {
    for answer in [0, -1] {
        let (libxl, mut peer, _abort) = conversation();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                peer.expect_and_answer(&switch(true), answer);
                peer.expect_and_answer(&switch(false), 0);
                peer.expect_and_answer(&Message::Complete { retval: 0, errno: 0 }, 0);
            });
            libxl.end_logdirty().unwrap();
            assert_eq!(libxl.switch_qemu_logdirty(5, true).is_ok(), answer == 0);
            libxl.end_logdirty().unwrap();
            libxl.end_logdirty().unwrap();
            libxl.complete(0, 0).unwrap();
        });
    }
}

#[test]
fn the_death_of_libxl_ends_every_wait_and_raises_the_abort() {
    let (libxl, mut peer, abort) = conversation();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            peer.expect(&Message::Suspend);
            peer.answers = None;
        });
        let error = libxl.suspend().unwrap_err().to_string();
        assert!(error.contains("libxl does not answer any more"), "{error}");
    });
    assert!(abort.is_raised());
    assert_eq!(abort.reason(), "libxl has gone");
    libxl.log(Level::Error, "nobody reads this");
    libxl.end_logdirty().unwrap();
    assert!(matches!(libxl.complete(-1, 5), Err(LibxlError::Gone(_))));
}

#[test]
fn a_line_for_a_dead_libxl_raises_the_abort() {
    let (libxl, peer, abort) = conversation();
    drop(peer);
    libxl.progress("memory", 1, 10);
    assert!(abort.is_raised());
    let (libxl, peer, abort) = conversation();
    drop(peer);
    libxl.log(Level::Info, "text");
    assert!(abort.is_raised());
}

#[test]
fn nothing_is_said_after_the_end() {
    let (libxl, mut peer, _abort) = conversation();
    peer.answer(0);
    libxl.complete(0, 0).unwrap();
    libxl.log(Level::Info, "late");
    libxl.progress("memory", 1, 10);
    assert!(matches!(libxl.suspend(), Err(LibxlError::Completed(_))));
    assert!(matches!(libxl.complete(-1, 5), Err(LibxlError::Completed(_))));
    drop(libxl);
    let mut said = Vec::new();
    peer.messages.read_to_end(&mut said).unwrap();
    assert_eq!(said, Message::Complete { retval: 0, errno: 0 }.encode());
}

#[test]
fn progress_is_sparse_and_its_end_is_always_shown() {
    let (libxl, mut peer, _abort) = conversation();
    let progress =
        |doing_what, done, total| Message::Progress { context: "pagecast", doing_what, done, total }.encode();
    for done in 0..10 {
        libxl.progress("memory", done, 10);
    }
    libxl.progress("memory", 10, 10);
    libxl.progress("final memory", 7, 0);
    drop(libxl);
    let mut said = Vec::new();
    peer.messages.read_to_end(&mut said).unwrap();
    let wanted = [progress("memory", 0, 10), progress("memory", 10, 10), progress("final memory", 1, 1)];
    assert_eq!(said, wanted.concat());
}

#[test]
fn progress_does_not_wait_for_a_libxl_that_does_not_read() {
    let (libxl, mut peer, abort) = conversation();
    // Far more than a pipe holds; each of them is sent if there is room.
    for round in 0..10_000u64 {
        libxl.progress("memory", round % 2 + 9, 10);
        libxl.progress("other", 10, 10);
    }
    assert!(!abort.is_raised());
    drop(libxl);
    let mut said = Vec::new();
    peer.messages.read_to_end(&mut said).unwrap();
    let one = Message::Progress { context: "pagecast", doing_what: "other", done: 10, total: 10 }.encode();
    assert!(said.len() < 10_000 * one.len(), "the pipe would have had to hold {} bytes", said.len());
}
