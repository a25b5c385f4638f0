//! What two pagecasts say to each other around the migration stream, on the same connection.
//!
//! ```text
//! source                               destination
//!   Hello        ------------------->               who, how much, over how many lanes
//!                <-------------------  Welcome       memory is ready
//!   stream ... END ----------------->
//!                <-------------------  Ready         everything arrived and was accepted; the guest can start
//!   Go           ------------------->               sent by the source guest's own process
//!                <-------------------  Running       the guest runs at the destination
//! ```
//!
//! At any time the destination may say `Aborted` instead and give up. If the connection breaks between `Go` and
//! `Running`, the source asks on a new one (`Resolve`), and the answer (`Running` or `Aborted`) is final: a
//! destination that has answered `Aborted` never starts the guest.
//!
//! A message is a magic word, a length and a JSON document, so that it can be read without reading ahead.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Version of this protocol; both sides must have the same.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 4] = *b"PCS1";
/// Bytes of the magic word and the length.
const HEAD: usize = 8;
const MAX_BODY: u32 = 16 * 1024;

/// Characters of a reason that are shown.
const MAX_REASON: usize = 500;

/// A message of the session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The source introduces a connection: lane 0 opens the migration, the others join it.
    Hello {
        /// Protocol version.
        version: u32,
        /// The migration's identity: 32 hexadecimal digits.
        migration: String,
        /// Pages of guest memory.
        nr_pages: u64,
        /// Connections in all.
        lanes: u16,
        /// Which of them this is.
        lane: u16,
        /// The memory of something that cannot run at the destination: to be compared and forgotten. To `Go` the answer is
        /// `Aborted`.
        #[serde(default)]
        image: bool,
    },
    /// The destination has its memory ready and understands that XALLOC pages are zero.
    Welcome {
        /// Protocol version.
        version: u32,
    },
    /// Every record of every lane was received and accepted; the guest waits for `Go`.
    Ready {
        /// Page records received, those without data included.
        pages: u64,
        /// CPU time that receiving took.
        cpu_ns: u64,
        /// Pages compared with the source's digests; 0 without verification.
        verified: u64,
        /// Time that the comparison took.
        verify_ns: u64,
    },
    /// Start the guest.
    Go,
    /// The guest runs here.
    Running,
    /// The guest does not run here and never will.
    Aborted {
        /// Why.
        reason: String,
    },
    /// To `Resolve`: nothing is known here of that migration, which settles nothing.
    Unknown,
    /// What became of this migration?
    Resolve {
        /// Its identity.
        migration: String,
    },
}

/// Writes one message.
pub fn send(mut connection: impl Write, message: &Message) -> io::Result<()> {
    let body = serde_json::to_vec(message).expect("a message is plain data");
    let mut frame = Vec::with_capacity(8 + body.len());
    frame.extend(MAGIC);
    frame.extend((body.len() as u32).to_le_bytes());
    frame.extend(body);
    connection.write_all(&frame)
}

/// Reads one message and not a byte more.
pub fn receive(connection: impl Read) -> io::Result<Message> {
    Arriving::default().read(connection)
}

/// A message that may arrive in pieces.
#[derive(Default)]
pub struct Arriving {
    /// What has come of it; never more than [`HEAD`] and [`MAX_BODY`] bytes.
    frame: Vec<u8>,
}

impl Arriving {
    /// Whether something has come of it.
    pub fn has_begun(&self) -> bool {
        !self.frame.is_empty()
    }

    /// Reads on, and not a byte further than the message's end. After `ErrorKind::WouldBlock` it can be called again.
    /// `ErrorKind::InvalidData`: it is no message.
    pub fn read(&mut self, mut connection: impl Read) -> io::Result<Message> {
        loop {
            let (come, due) = (self.frame.len(), self.due()?);
            if come == due {
                return parse(&self.frame[HEAD..]);
            }
            self.frame.resize(due, 0);
            let read = connection.read(&mut self.frame[come..]);
            self.frame.truncate(come + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(self.ended()),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Bytes of the message as far as is known: its head, then all of it.
    fn due(&self) -> io::Result<usize> {
        if !MAGIC.starts_with(&self.frame[..self.frame.len().min(MAGIC.len())]) {
            return Err(invalid("the other side does not speak pagecast's session protocol"));
        }
        let Some((head, _)) = self.frame.split_first_chunk::<HEAD>() else { return Ok(HEAD) };
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        if length > MAX_BODY {
            return Err(invalid("a session message is longer than the protocol allows"));
        }
        Ok(HEAD + length as usize)
    }

    fn ended(&self) -> io::Error {
        let what = if self.has_begun() {
            "the other side closed the connection in the midst of a message"
        } else {
            "the other side closed the connection without a word"
        };
        io::Error::new(io::ErrorKind::UnexpectedEof, what)
    }
}

fn parse(body: &[u8]) -> io::Result<Message> {
    match serde_json::from_slice(body) {
        Ok(Message::Aborted { reason }) => Ok(Message::Aborted { reason: printable(&reason) }),
        Ok(message) => Ok(message),
        Err(error) => {
            // It quotes what it does not know.
            let error = printable(&error.to_string());
            Err(invalid(&format!("a session message makes no sense ({error}); same version?")))
        }
    }
}

/// A text of the other side's as it may be shown: one line, not too long, and nothing that a terminal would act upon.
fn printable(text: &str) -> String {
    text.chars().take(MAX_REASON).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A new migration's identity.
pub fn new_migration() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            ("[0-9a-f]{32}", any::<u64>(), any::<u16>(), any::<u16>(), any::<bool>()).prop_map(
                |(migration, nr_pages, lanes, lane, image)| Message::Hello {
                    version: VERSION,
                    migration,
                    nr_pages,
                    lanes,
                    lane,
                    image
                }
            ),
            any::<u32>().prop_map(|version| Message::Welcome { version }),
            (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
                |(pages, cpu_ns, verified, verify_ns)| Message::Ready { pages, cpu_ns, verified, verify_ns }
            ),
            Just(Message::Go),
            Just(Message::Running),
            Just(Message::Unknown),
            "[^\\p{Cc}]{0,200}".prop_map(|reason| Message::Aborted { reason }),
            "[0-9a-f]{32}".prop_map(|migration| Message::Resolve { migration }),
        ]
    }

    /// A connection that more may come on.
    struct Patient<'a, 'b>(&'a mut &'b [u8]);

    impl Read for Patient<'_, '_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { self.0.read(into) }
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received_and_nothing_is_read_ahead(message in message()) {
            let mut wire = Vec::new();
            send(&mut wire, &message).unwrap();
            let length = wire.len();
            wire.extend(b"what follows");
            let mut cursor = io::Cursor::new(wire);
            prop_assert_eq!(receive(&mut cursor).unwrap(), message);
            prop_assert_eq!(cursor.position() as usize, length);
        }

        #[test]
        fn a_message_that_comes_in_pieces_is_the_same(message in message(), size in 1usize..40) {
            let mut wire = Vec::new();
            send(&mut wire, &message).unwrap();
            let mut arriving = Arriving::default();
            let mut pieces = wire.chunks(size).peekable();
            while let Some(mut piece) = pieces.next() {
                let read = arriving.read(Patient(&mut piece));
                match pieces.peek() {
                    Some(_) => prop_assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock),
                    None => prop_assert_eq!(read.unwrap(), message.clone()),
                }
            }
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(wire in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = receive(io::Cursor::new(wire));
        }
    }

    #[test]
    fn what_the_other_side_says_cannot_drive_a_terminal() {
        let mut wire = Vec::new();
        send(&mut wire, &Message::Aborted { reason: "\x1b[2Jgone\nforged line".repeat(100) }).unwrap();
        let Ok(Message::Aborted { reason }) = receive(io::Cursor::new(wire)) else { panic!("a reason") };
        assert!(reason.chars().count() <= MAX_REASON && !reason.contains(char::is_control), "{reason}");
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_believed() {
        let mut wire = MAGIC.to_vec();
        wire.extend(u32::MAX.to_le_bytes());
        let error = receive(io::Cursor::new(wire)).unwrap_err();
        assert!(error.to_string().contains("longer than the protocol allows"));
    }
}
