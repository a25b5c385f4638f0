//! Libxl, as a save helper sees it: written from Xen's libxl_save_msgs_gen.pl and libxl_save_callout.c, not from the code
//! that is tested.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};

/// What a save helper says.
#[derive(Debug, PartialEq)]
pub enum Said {
    Log { level: u32, errno: i32, context: String, text: String },
    Progress { doing_what: String, done: u64, total: u64 },
    Suspend,
    SwitchQemuLogdirty { domid: u32, enable: u32 },
    Complete { retval: i32, errno: i32 },
}

pub const DETAIL: u32 = 3;
pub const INFO: u32 = 5;
pub const WARN: u32 = 7;
pub const ERROR: u32 = 8;

/// In which state a save helper finds SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SigTerm {
    Default,
    Blocked,
    Ignored,
}

/// A save helper that libxl has started.
pub struct Helper {
    child: Child,
    messages: Option<File>,
    answers: Option<File>,
    /// The far end of the stream.
    pub stream: File,
    /// The number of the near end in the save helper.
    pub stream_fd: i32,
}

impl Helper {
    /// Starts `program`. `STREAM` in its arguments stands for the number of the stream's descriptor.
    pub fn start(program: &Path, arguments: &str, environment: &[(&str, &str)], sigterm: SigTerm) -> Self {
        let (far, near) = rustix::pipe::pipe().expect("a pipe");
        fcntl_setfd(&far, FdFlags::CLOEXEC).expect("it is open");
        let stream_fd = near.as_raw_fd();
        let mut command = match sigterm {
            SigTerm::Default => Command::new(program),
            SigTerm::Blocked => {
                let mut command = Command::new(std::env::current_exe().expect("its own path"));
                command.arg(crate::MASKED).arg(program);
                command
            }
            SigTerm::Ignored => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", "trap '' TERM; exec \"$0\" \"$@\""]).arg(program);
                command
            }
        };
        let mut child = command
            .args(arguments.replace("STREAM", &stream_fd.to_string()).split(' '))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the save helper can be started");
        let pipe = |end: std::os::fd::OwnedFd| Some(File::from(end));
        let messages = child.stdout.take().and_then(|end| pipe(end.into()));
        let answers = child.stdin.take().and_then(|end| pipe(end.into()));
        Helper { child, messages, answers, stream: far.into(), stream_fd }
    }

    /// The next thing that it says; None when it has closed its side.
    pub fn next(&mut self) -> Option<Said> {
        let messages = self.messages.as_mut().expect("libxl is alive");
        let mut length = [0; 2];
        match messages.read_exact(&mut length) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return None,
            other => other.expect("a pipe"),
        }
        let mut body = vec![0; u16::from_ne_bytes(length).into()];
        messages.read_exact(&mut body).expect("a whole message");
        Some(decode(&body))
    }

    /// The next thing that it says, details for the log left out.
    pub fn hear(&mut self) -> Said {
        loop {
            match self.next().expect("it says something") {
                Said::Log { level, .. } if level <= DETAIL => {}
                said => return said,
            }
        }
    }

    /// Expects a line for the log of this level with all of `parts` in it.
    pub fn hear_log(&mut self, level: u32, parts: &[&str]) {
        match self.hear() {
            Said::Log { level: found, errno: -1, context, text } => {
                assert_eq!((found, context.as_str()), (level, "pagecast"), "{text}");
                assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text:?}");
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn expect(&mut self, wanted: Said) {
        assert_eq!(self.hear(), wanted);
    }

    pub fn answer(&mut self, answer: i32) {
        self.answers.as_mut().expect("libxl is alive").write_all(&answer.to_ne_bytes()).expect("it reads");
    }

    /// Expects the end, answers it, and waits for the save helper to exit with 0, as libxl wants it.
    pub fn expect_complete(mut self, retval: i32, errno: i32) {
        self.expect(Said::Complete { retval, errno });
        self.answer(0);
        assert_eq!(self.next(), None, "nothing comes after the end");
        assert_eq!(self.exit_code(), Some(0));
    }

    pub fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().expect("our own process").code()
    }

    pub fn kill(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("our own process");
    }

    /// Libxl dies: its ends of the pipes close.
    pub fn die(&mut self) {
        (self.messages, self.answers) = (None, None);
    }

    /// Writes to its standard input something that is no answer, and closes that.
    pub fn write_and_close(&mut self, text: &str) {
        let mut answers = self.answers.take().expect("libxl is alive");
        answers.write_all(text.as_bytes()).expect("it reads");
    }

    /// Everything that comes on its standard output from now on.
    pub fn rest(&mut self) -> String {
        let mut text = String::new();
        self.messages.as_mut().expect("libxl is alive").read_to_string(&mut text).expect("text");
        text
    }

    /// Reads this much of the stream.
    pub fn read_stream(&mut self, length: usize) -> String {
        let mut text = vec![0; length];
        self.stream.read_exact(&mut text).expect("so much was written");
        String::from_utf8(text).expect("text")
    }

    /// The inodes of the pipes that it was given: standard input, standard output, the stream.
    pub fn pipes(&self) -> [u64; 3] {
        let inode = |file: &File| file.metadata().expect("it is open").ino();
        let open = |file: &Option<File>| inode(file.as_ref().expect("libxl is alive"));
        [open(&self.answers), open(&self.messages), inode(&self.stream)]
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a message's arguments one after the other.
struct Arguments<'a>(&'a [u8]);

impl Arguments<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_first_chunk::<N>().expect("the message is long enough");
        self.0 = rest;
        *taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn i32(&mut self) -> i32 {
        i32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn string(&mut self) -> String {
        let (string, rest) =
            self.0[4..].split_at(u32::from_ne_bytes(self.0[..4].try_into().unwrap()) as usize);
        self.0 = rest;
        let (nul, text) = string.split_last().expect("it has its NUL");
        assert_eq!((*nul, text.contains(&0)), (0, false), "one NUL, at the end");
        String::from_utf8(text.to_vec()).expect("text")
    }
}

fn decode(body: &[u8]) -> Said {
    let mut arguments = Arguments(body);
    let said = match u16::from_ne_bytes(arguments.take()) {
        1 => {
            let (level, errno) = (arguments.u32(), arguments.i32());
            assert!((1..=9).contains(&level), "libxl would die of level {level}");
            Said::Log { level, errno, context: arguments.string(), text: arguments.string() }
        }
        2 => {
            assert_eq!(arguments.string(), "pagecast");
            Said::Progress { doing_what: arguments.string(), done: arguments.u64(), total: arguments.u64() }
        }
        3 => Said::Suspend,
        7 => Said::SwitchQemuLogdirty { domid: arguments.u32(), enable: arguments.u32() },
        10 => Said::Complete { retval: arguments.i32(), errno: arguments.i32() },
        other => panic!("libxl would drop message {other}, and both sides would wait for ever"),
    };
    assert!(arguments.0.is_empty(), "nothing follows the arguments");
    said
}
