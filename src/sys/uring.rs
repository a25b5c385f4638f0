//! The io_uring of a sender: copying and zero-copy sends on one socket, with registered buffers.
//!
//! Rules kept by the caller (`pipeline::sender`): one request or one linked chain in flight on a socket, because
//! unlinked sends may be interleaved; every byte handed in stays valid and in place until the request's last
//! completion, which for zero-copy sends is the notification.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use bitflags::bitflags;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

bitflags! {
    /// Bits of a send's `ioprio` (linux/io_uring.h, `IORING_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct SendBits: u16 {
        const FIXED_BUF = 1 << 2;
        const REPORT_USAGE = 1 << 3;
    }
}

/// The largest buffer that the kernel registers in one piece.
pub const MAX_REGISTERED_BYTES: usize = 1 << 30;

/// A send that waits to be submitted.
#[derive(Clone, Copy, Debug)]
pub enum SendOp {
    /// Copying send of one range.
    Plain {
        /// First byte.
        data: *const u8,
        /// Bytes.
        len: u32,
        /// Another send follows at once.
        more: bool,
    },
    /// Copying send of a message's iovecs.
    PlainMsg {
        /// The message.
        msg: *const libc::msghdr,
    },
    /// Zero-copy send of one range, of the registered buffer `buffer` if there is one.
    ZeroCopy {
        /// First byte.
        data: *const u8,
        /// Bytes.
        len: u32,
        /// The registered buffer.
        buffer: Option<u16>,
    },
    /// Zero-copy send of a message's iovecs, all within the registered buffer `buffer` if there is one.
    ZeroCopyMsg {
        /// The message.
        msg: *const libc::msghdr,
        /// The registered buffer.
        buffer: Option<u16>,
    },
}

/// One completion queue entry, as the kernel posted it.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The request's number.
    pub id: u64,
    /// `res`: bytes sent or a negated errno.
    pub result: i32,
    /// `flags`.
    pub flags: u32,
}

/// Opcodes that matter to a sender, as this kernel has them.
#[derive(Clone, Copy, Debug)]
pub struct Opcodes {
    /// IORING_OP_SEND
    pub send: bool,
    /// IORING_OP_SENDMSG
    pub sendmsg: bool,
    /// IORING_OP_SEND_ZC (Linux 6.0)
    pub send_zc: bool,
    /// IORING_OP_SENDMSG_ZC (Linux 6.1)
    pub sendmsg_zc: bool,
}

/// Asks the kernel which opcodes it has. Err: io_uring itself is not to be had, and why.
pub fn probe_opcodes() -> io::Result<Opcodes> {
    let ring = IoUring::new(2)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    Ok(Opcodes {
        send: probe.is_supported(opcode::Send::CODE),
        sendmsg: probe.is_supported(opcode::SendMsg::CODE),
        send_zc: probe.is_supported(opcode::SendZc::CODE),
        sendmsg_zc: probe.is_supported(opcode::SendMsgZc::CODE),
    })
}

/// Whether SENDMSG_ZC takes registered buffers: the opcode is older than that (Linux 6.15), and no flag tells. Tries it
/// on a connection of its own; false if that cannot be had.
pub fn takes_fixed_messages() -> bool {
    let attempt = || -> io::Result<bool> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let _far = listener.accept()?;
        let page = vec![0u8; 4096];
        let mut part = libc::iovec { iov_base: page.as_ptr().cast_mut().cast(), iov_len: page.len() };
        // SAFETY: an all-zero msghdr is a valid message without name, data or control.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        let mut ring = SendRing::new(near.as_raw_fd(), 2)?;
        // SAFETY: `page` lives until the function returns, and the ring is dropped before it.
        unsafe { ring.register(&[part]) }?;
        // SAFETY: message and page live until the function returns, by which time the kernel has answered or the ring,
        // and the request with it, is gone; the page is never written.
        unsafe { ring.queue(SendOp::ZeroCopyMsg { msg: &raw const message, buffer: Some(0) }, false, 1) }?;
        ring.submit_and_wait(1, Duration::from_secs(1))?;
        Ok(ring.next_completion().is_some_and(|first| first.result == page.len() as i32))
    };
    attempt().unwrap_or(false)
}

/// An io_uring that sends on one socket. To be made and used by one thread.
pub struct SendRing {
    ring: IoUring,
    socket: RawFd,
}

impl SendRing {
    /// A ring of `entries` requests for `socket`, which the caller keeps open.
    pub fn new(socket: RawFd, entries: u32) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(entries * 8).setup_submit_all().setup_single_issuer().setup_defer_taskrun();
        let ring = match builder.build(entries) {
            // Kernels before 6.1 know neither of the last two flags; they cost nothing but speed.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_cqsize(entries * 8).build(entries)?
            }
            other => other?,
        };
        Ok(SendRing { ring, socket })
    }

    /// Pins and registers buffers; the n-th is used as `buffer: Some(n)`.
    ///
    /// # Safety
    /// The memory must stay mapped until the ring is dropped.
    pub unsafe fn register(&mut self, buffers: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller keeps the memory mapped for as long as the ring lives.
        unsafe { self.ring.submitter().register_buffers(buffers) }
    }

    /// Queues a send as request `id`, linked to the next one if `link`: that one starts when this one is done.
    ///
    /// # Safety
    /// What `op` points to must stay valid until the request's last completion.
    pub unsafe fn queue(&mut self, op: SendOp, link: bool, id: u64) -> io::Result<()> {
        let socket = Fd(self.socket);
        let wait_all = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = match op {
            SendOp::Plain { data, len, more } => {
                let more = if more { libc::MSG_MORE } else { 0 };
                opcode::Send::new(socket, data, len).flags(wait_all | more).build()
            }
            SendOp::PlainMsg { msg } => opcode::SendMsg::new(socket, msg).flags(wait_all as u32).build(),
            SendOp::ZeroCopy { data, len, buffer } => opcode::SendZc::new(socket, data, len)
                .buf_index(buffer)
                .flags(wait_all)
                .zc_flags(SendBits::REPORT_USAGE.bits())
                .build(),
            SendOp::ZeroCopyMsg { msg, buffer } => {
                let fixed = if buffer.is_some() { SendBits::FIXED_BUF } else { SendBits::empty() };
                let entry = opcode::SendMsgZc::new(socket, msg)
                    .flags(wait_all as u32)
                    .ioprio((SendBits::REPORT_USAGE | fixed).bits())
                    .build();
                with_buffer_index(entry, buffer)
            }
        };
        let flags = if link { squeue::Flags::IO_LINK } else { squeue::Flags::empty() };
        let entry = entry.flags(flags).user_data(id);
        // SAFETY: the caller keeps everything the entry points to valid until its last completion.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the submission queue is full"))
    }

    /// Submits what is queued and waits until `want` completions are there or `timeout` has passed.
    pub fn submit_and_wait(&mut self, want: usize, timeout: Duration) -> io::Result<()> {
        let timespec = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        let args = SubmitArgs::new().timespec(&timespec);
        match self.ring.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion that has arrived.
    pub fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        Some(Completion { id: entry.user_data(), result: entry.result(), flags: entry.flags() })
    }
}

/// Sets `buf_index`, which the crate's `SendMsgZc` has no way to set.
fn with_buffer_index(mut entry: squeue::Entry, buffer: Option<u16>) -> squeue::Entry {
    /// Offset of `buf_index` in `struct io_uring_sqe`.
    const BUF_INDEX: usize = 40;
    const _: () = assert!(size_of::<squeue::Entry>() == 64);
    if let Some(index) = buffer {
        // SAFETY: an Entry is exactly one 64-byte io_uring_sqe (repr(C), asserted above); bytes 40..42 of it are
        // the u16 buf_index, which any value may fill.
        unsafe { std::ptr::from_mut(&mut entry).cast::<u8>().add(BUF_INDEX).cast::<u16>().write(index) };
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_for_messages_agrees_with_the_kernels_age() {
        match probe_opcodes() {
            Ok(opcodes) if opcodes.sendmsg_zc => {
                let release = rustix::system::uname();
                let release = release.release().to_string_lossy().into_owned();
                let mut numbers =
                    release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
                let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
                assert!(takes_fixed_messages() || version < (6, 15), "Linux {release}");
            }
            _ => eprintln!("SKIPPED: no zero-copy messages on this kernel"),
        }
    }
}
