//! A descriptor to write the stream to, whatever it is: a pipe or a file as `xl migrate` and `xl save` hand over, or a socket.
//!
//! The descriptor is shared with whoever handed it over, so its flags stay as they are. A pipe is opened once more through
//! /proc, non-blocking, so that a receiver that stops reading does not hold up an abort.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::net::SendFlags;

/// The size that a pipe is given if it is smaller and the limits allow it: as much as an unprivileged process may ask for.
const PIPE_BYTES: usize = 1 << 20;

/// What a blocking pipe with any room at all takes without waiting.
const SURE_BYTES: usize = 4096;

/// What the stream goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pipe that holds so many bytes.
    Pipe {
        /// Its size.
        bytes: usize,
    },
    /// A file.
    File,
    /// A socket.
    Socket,
    /// Something else that can be written to, a terminal or a device.
    Other,
}

/// A descriptor to write to, in pieces, with a limit on each wait.
#[derive(Debug)]
pub struct StreamOut {
    fd: OwnedFd,
    kind: Kind,
    /// A write that does not find room comes back.
    non_blocking: bool,
}

impl StreamOut {
    /// Takes over a descriptor that is open for writing. A pipe is made larger.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Fifo => Self::pipe(fd),
            FileType::RegularFile => Ok(StreamOut { fd, kind: Kind::File, non_blocking: false }),
            FileType::Socket => Ok(StreamOut { fd, kind: Kind::Socket, non_blocking: true }),
            _ => Ok(StreamOut { fd, kind: Kind::Other, non_blocking: false }),
        }
    }

    fn pipe(fd: OwnedFd) -> io::Result<Self> {
        let size = rustix::pipe::fcntl_getpipe_size(&fd)?;
        if size < PIPE_BYTES {
            // A pipe as it is will do.
            let _ = rustix::pipe::fcntl_setpipe_size(&fd, PIPE_BYTES);
        }
        let kind = Kind::Pipe { bytes: rustix::pipe::fcntl_getpipe_size(&fd)? };
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        match again {
            Ok(again) => Ok(StreamOut { fd: again.into(), kind, non_blocking: true }),
            Err(_) => Ok(StreamOut { fd, kind, non_blocking: false }),
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes that a pipe holds; 0 for anything else.
    pub fn buffered(&self) -> u64 {
        match self.kind {
            Kind::Pipe { .. } => rustix::io::ioctl_fionread(&self.fd).unwrap_or(0),
            _ => 0,
        }
    }

    /// Writes as much of `parts` as there is room for now, waiting `patience` at most for there to be any; 0 if there is none.
    pub fn write_some(&self, parts: &[IoSlice], patience: Duration) -> io::Result<usize> {
        if self.kind != Kind::File && !self.has_room(patience)? {
            return Ok(0);
        }
        let first = parts.iter().find(|part| !part.is_empty()).map_or(&[][..], |part| part);
        let wrote = match (self.kind, self.non_blocking) {
            (Kind::Socket, _) => {
                rustix::net::send(&self.fd, first, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            (Kind::File, _) | (_, true) => rustix::io::writev(&self.fd, parts),
            _ => rustix::io::write(&self.fd, &first[..first.len().min(SURE_BYTES)]),
        };
        match wrote {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            other => other.map_err(io::Error::from),
        }
    }

    /// Writes all of `bytes`. `ErrorKind::Interrupted`: `give_up` said so.
    pub fn write_all(&self, mut bytes: &[u8], give_up: &dyn Fn() -> bool) -> io::Result<()> {
        while !bytes.is_empty() {
            if give_up() {
                return Err(ErrorKind::Interrupted.into());
            }
            let wrote = self.write_some(&[IoSlice::new(bytes)], Duration::from_millis(50))?;
            bytes = &bytes[wrote..];
        }
        Ok(())
    }

    fn has_room(&self, patience: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let found = fds[0].revents();
        if found.contains(PollFlags::ERR) {
            // The reader is gone. (Writing would say the same, and raise SIGPIPE where that is not ignored.)
            return Err(ErrorKind::BrokenPipe.into());
        }
        Ok(found.contains(PollFlags::OUT))
    }
}

impl AsFd for StreamOut {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_pipe_is_enlarged_and_its_flags_are_left_alone() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let kept = writer.try_clone().unwrap();
        let out = StreamOut::new(writer.into()).unwrap();
        assert_eq!(out.kind(), Kind::Pipe { bytes: PIPE_BYTES });
        let flags = rustix::fs::fcntl_getfl(&kept).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "whoever handed it over finds it blocking");
        drop(kept);
        let parts = [IoSlice::new(b"mig"), IoSlice::new(b"ration")];
        assert_eq!(out.write_some(&parts, Duration::from_secs(1)).unwrap(), 9);
        assert_eq!(out.buffered(), 9);
        drop(out);
        let mut read = String::new();
        reader.read_to_string(&mut read).unwrap();
        assert_eq!(read, "migration");
    }

    #[test]
    fn a_receiver_that_stops_reading_does_not_hold_the_writer_up() {
        let (reader, writer) = std::io::pipe().unwrap();
        let out = StreamOut::new(writer.into()).unwrap();
        let looks = std::cell::Cell::new(0);
        let error = out
            .write_all(&vec![7; 2 * PIPE_BYTES], &|| {
                looks.set(looks.get() + 1);
                looks.get() > 5
            })
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        drop(reader);
        assert_eq!(out.write_all(b"x", &|| false).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_broken_at_the_first_write() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = StreamOut::new(writer.into()).unwrap();
        assert_eq!(out.write_all(b"x", &|| false).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_file_takes_everything() {
        let file = tempfile::tempfile().unwrap();
        let out = StreamOut::new(file.try_clone().unwrap().into()).unwrap();
        assert_eq!(out.kind(), Kind::File);
        out.write_all(&[3; 100_000], &|| false).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 100_000);
    }
}
