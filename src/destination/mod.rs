//! The receive side: takes one migration, checks everything before it believes it, and gives the guest to a process
//! of its own.
//!
//! * [`receiver`]: one migration from the first connection to the hand-over.
//! * [`door`]: who connects says what it wants, and strangers are sent away.
//! * [`lane`]: one connection's stream, read straight into guest memory.
//! * [`incoming`]: the guest's own process, which the receiver prepares and then arms with the connection.

pub mod door;
pub mod incoming;
pub mod lane;
pub mod receiver;

/// Why a migration was not received. The source is told, and its guest runs on there.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// The address.
        address: String,
        /// What the call said.
        source: std::io::Error,
    },
    /// A connection does not begin as a migration does.
    #[error("not a migration: {0}; send one with `pagecast send` of the same version")]
    Hello(String),
    /// The guest is more than this host will take.
    #[error("the guest has {guest_mib} MiB, more than the {limit_mib} MiB allowed here; raise --max-memory")]
    TooLarge {
        /// Its memory.
        guest_mib: u64,
        /// What is allowed.
        limit_mib: u64,
    },
    /// Memory or threads are not to be had.
    #[error("cannot prepare for the guest: {0}")]
    Prepare(String),
    /// The stream is not what it should be.
    #[error("lane {lane}: {source}")]
    Stream {
        /// Which connection.
        lane: u16,
        /// What is wrong, in which record, at which offset.
        source: crate::stream::StreamError,
    },
    /// The connection ended before the stream did.
    #[error("lane {lane}: the source ended the migration (it called it off or went away) at {place}")]
    SourceGone {
        /// Which connection.
        lane: u16,
        /// How far the stream came.
        place: crate::stream::Place,
    },
    /// The stream is well-formed, but what it carries cannot be accepted.
    #[error("lane {lane}: {reason}")]
    Content {
        /// Which connection.
        lane: u16,
        /// Why.
        reason: String,
    },
    /// The captured stream cannot be written.
    #[error("cannot write the captured stream {path}: {source}; choose another file with --capture")]
    Capture {
        /// The file.
        path: String,
        /// What the call said.
        source: std::io::Error,
    },
    /// The guest's own process failed.
    #[error("the guest's process failed: {0}")]
    Guest(String),
}

impl ReceiveError {
    /// Whether there was a source, which knows of it or was told.
    pub fn is_known_to_source(&self) -> bool {
        !matches!(self, ReceiveError::Listen { .. })
    }
}
