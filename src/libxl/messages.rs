//! The messages from a save helper to libxl, as bytes.
//!
//! libxl_save_msgs_gen.pl, the same from Xen 4.17 to 4.22. A message is a u16 length and a body: a u16 number and
//! the arguments, in native byte order, unaligned. A string is a u32 length, its NUL included, and the bytes. libxl drops
//! what it does not understand without a word, and if that needed an answer both sides wait for ever: so nothing that
//! is made here can be malformed.

/// How much a line of the log matters. libxl asserts that it is one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// For developers. xl shows this and the next two with -v only.
    Debug = 1,
    /// More than users want to know.
    Verbose = 2,
    /// Details.
    Detail = 3,
    /// How far it is.
    Progress = 4,
    /// What is done.
    Info = 5,
    /// Worth noticing.
    Notice = 6,
    /// Not as it should be.
    Warn = 7,
    /// It failed.
    Error = 8,
    /// It failed badly.
    Critical = 9,
}

/// The longest text, in bytes. A whole message stays below PIPE_BUF (4096), so that it is written in one piece.
pub const MAX_TEXT: usize = 3800;

/// The longest context and the longest name of what is being done.
const MAX_NAME: usize = 100;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message<'a> {
    /// A line for the log. `errno` is said after it, in words.
    Log { level: Level, errno: Option<i32>, context: &'a str, text: &'a str },
    /// How far something is.
    Progress { context: &'a str, doing_what: &'a str, done: u64, total: u64 },
    /// Asks to suspend the guest.
    Suspend,
    /// Asks to have qemu log what it writes into guest memory, or to leave that.
    SwitchQemuLogdirty { domid: u32, enable: bool },
    /// How it ended: the last message.
    Complete { retval: i32, errno: i32 },
}

impl Message<'_> {
    /// As it is written.
    pub fn encode(&self) -> Vec<u8> {
        let mut frame = vec![0, 0];
        frame.extend(self.number().to_ne_bytes());
        match *self {
            Message::Log { level, errno, context, text } => {
                frame.extend((level as u32).to_ne_bytes());
                frame.extend(errno.unwrap_or(-1).to_ne_bytes());
                push_string(&mut frame, context, MAX_NAME);
                push_string(&mut frame, text, MAX_TEXT);
            }
            Message::Progress { context, doing_what, done, total } => {
                push_string(&mut frame, context, MAX_NAME);
                push_string(&mut frame, doing_what, MAX_NAME);
                frame.extend(done.to_ne_bytes());
                frame.extend(total.to_ne_bytes());
            }
            Message::Suspend => {}
            Message::SwitchQemuLogdirty { domid, enable } => {
                frame.extend(domid.to_ne_bytes());
                frame.extend(u32::from(enable).to_ne_bytes());
            }
            Message::Complete { retval, errno } => {
                frame.extend(retval.to_ne_bytes());
                frame.extend(errno.to_ne_bytes());
            }
        }
        // Below 4096 by the limits above.
        let length = (frame.len() - 2) as u16;
        frame[..2].copy_from_slice(&length.to_ne_bytes());
        frame
    }

    fn number(&self) -> u16 {
        match self {
            Message::Log { .. } => 1,
            Message::Progress { .. } => 2,
            Message::Suspend => 3,
            Message::SwitchQemuLogdirty { .. } => 7,
            Message::Complete { .. } => 10,
        }
    }
}

/// Appends `text` as one line of `limit` bytes at most. What a C string or a terminal would take amiss becomes a space.
fn push_string(frame: &mut Vec<u8>, text: &str, limit: usize) {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > limit {
        let cut = (0..=limit - "…".len()).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(cut);
        line.push('…');
    }
    frame.extend((line.len() as u32 + 1).to_ne_bytes());
    frame.extend(line.as_bytes());
    frame.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes of numbers and text, for little-endian machines: written out, not computed.
    fn bytes(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn every_message_has_the_bytes_that_libxl_reads() {
        let log =
            Message::Log { level: Level::Error, errno: Some(22), context: "pagecast", text: "no: a\nb" };
        assert_eq!(
            log.encode(),
            bytes(&[b"\x23\0\x01\0\x08\0\0\0\x16\0\0\0", b"\x09\0\0\0pagecast\0", b"\x08\0\0\0no: a b\0"])
        );
        let plain = Message::Log { level: Level::Debug, errno: None, context: "", text: "" };
        assert_eq!(plain.encode(), b"\x14\0\x01\0\x01\0\0\0\xff\xff\xff\xff\x01\0\0\0\0\x01\0\0\0\0");
        let progress = Message::Progress { context: "x", doing_what: "memory", done: 1, total: 1 << 32 };
        assert_eq!(
            progress.encode(),
            bytes(&[b"\x23\0\x02\0\x02\0\0\0x\0\x07\0\0\0memory\0", b"\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0"])
        );
        assert_eq!(Message::Suspend.encode(), b"\x02\0\x03\0");
        let on = Message::SwitchQemuLogdirty { domid: 258, enable: true };
        assert_eq!(on.encode(), b"\x0a\0\x07\0\x02\x01\0\0\x01\0\0\0");
        let off = Message::SwitchQemuLogdirty { domid: 1, enable: false };
        assert_eq!(off.encode(), b"\x0a\0\x07\0\x01\0\0\0\0\0\0\0");
        let complete = Message::Complete { retval: -1, errno: 4 };
        assert_eq!(complete.encode(), b"\x0a\0\x0a\0\xff\xff\xff\xff\x04\0\0\0");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_text_makes_a_message_long_or_malformed(context in ".{0,300}", text in "(?s).{0,5000}") {
            let frame = Message::Log { level: Level::Info, errno: None, context: &context, text: &text }.encode();
            prop_assert!(frame.len() <= 4096);
            let u32_at = |at: usize| u32::from_ne_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
            prop_assert_eq!(u16::from_ne_bytes([frame[0], frame[1]]) as usize, frame.len() - 2);
            let mut at = 12;
            for _ in 0..2 {
                let string = &frame[at + 4..at + 4 + u32_at(at)];
                prop_assert_eq!(string.iter().position(|byte| *byte == 0), Some(string.len() - 1));
                prop_assert!(!std::str::from_utf8(string).unwrap().contains('\n'));
                at += 4 + string.len();
            }
            prop_assert_eq!(at, frame.len());
        }
    }
}
