//! The sender: owns a socket and an io_uring, and puts filled slots on the wire.
//!
//! One linked chain is in flight at a time, because unlinked sends on a socket may be interleaved. A slot goes back
//! to the mapper when the kernel has let go of it: with zero-copy sends that is the notification, which comes after
//! the other side's acknowledgement, and which nobody waits for before the next chain.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::{BATCH_PAGES, FilledSlot};
use super::latency::{Latencies, Notified, Stage};
use super::ring::{Consumer, PopError, Producer};
use super::shared::{Idle, Shared};
use super::slots::{Slot, SlotPool, give_back};
use crate::page::PAGE_SIZE;
use crate::sys::guest_memory::GuestMemory;
use crate::sys::uring::{MAX_REGISTERED_BYTES, SendOp, SendRing};
use crate::sys::{cpu, socket};
use crate::transport::ledger::{
    Completion, Counters, Ledger, LedgerError, Outcome, Posted, SendKind, TicketId,
};
use crate::transport::pacer::Pacer;

/// Slots in one linked chain.
const CHAIN_SLOTS: usize = 4;

/// The most requests that one slot needs: the record's head, and the pages from guest memory.
const REQUESTS_PER_SLOT: usize = 2;

/// After so many notifications that all say "copied", zero-copy is given up where that is allowed.
const FALL_BACK_AFTER: u64 = 64;

/// How long one wait may last before the abort flag is looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// How long a broken connection may take to let go of its pages before it is cut.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

/// What to send from and how.
pub struct SenderSetup {
    /// The connection.
    pub socket: Arc<TcpStream>,
    /// The lane's number.
    pub lane: usize,
    /// The slots.
    pub pool: SlotPool,
    /// Guest memory to send from, in direct mode.
    pub guest: Option<Arc<GuestMemory>>,
    /// Send without copying.
    pub zero_copy: bool,
    /// The kernel takes messages from registered buffers.
    pub fixed_messages: bool,
    /// Go over to copying sends when the kernel copies all the same.
    pub may_fall_back: bool,
    /// The lane's share of the bandwidth cap, in bytes per second.
    pub bytes_per_s: Option<u64>,
}

/// What a sender leaves behind.
#[derive(Clone, Debug, Default)]
pub struct SenderReport {
    /// Bytes by kind of send.
    pub bytes: Counters,
    /// Whether zero-copy was given up on the way.
    pub fell_back: bool,
    /// Whether all sends came from registered buffers.
    pub registered: bool,
    /// System calls into the ring.
    pub enters: u64,
    /// CPU time of the thread.
    pub cpu: Duration,
    /// How long sends and notifications took.
    pub latencies: Latencies,
}

/// Why a sender stopped early.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// io_uring is not to be had.
    #[error("cannot set up io_uring: {0}; is it disabled (sysctl kernel.io_uring_disabled, seccomp)?")]
    Setup(#[source] std::io::Error),
    /// What is to be sent without copying cannot be pinned.
    #[error(
        "cannot register the memory to send from: {0}; raise the limit on locked memory (ulimit -l) or use --send copy"
    )]
    Register(#[source] std::io::Error),
    /// A call into the ring failed.
    #[error("io_uring failed: {0}")]
    Ring(#[source] std::io::Error),
    /// The connection broke.
    #[error("the connection to the destination broke: {0}")]
    Connection(#[source] std::io::Error),
    /// The kernel's completions contradict what was submitted.
    #[error("io_uring's completions make no sense: {0}")]
    Ledger(#[from] LedgerError),
    /// The migration was aborted.
    #[error("aborted")]
    Aborted,
}

impl SendError {
    /// Whether the other side may know more about it.
    pub fn is_of_connection(&self) -> bool {
        let broken = [libc::EPIPE, libc::ECONNRESET, libc::ETIMEDOUT, libc::ECANCELED];
        matches!(self, SendError::Connection(error) if error.raw_os_error().is_some_and(|code| broken.contains(&code)))
    }
}

/// Stable memory for the message of one slot, while a request refers to it.
struct Message {
    header: libc::msghdr,
    parts: Box<[libc::iovec; BATCH_PAGES + 1]>,
}

/// A sender's state. It is made and used on its own thread, as its ring demands.
pub struct Sender {
    ring: SendRing,
    ledger: Ledger<FilledSlot>,
    messages: Vec<Message>,
    setup: SenderSetup,
    registered: bool,
    pacer: Pacer,
    started: Instant,
    filled: Consumer<FilledSlot>,
    free: Producer<Slot>,
    shared: Arc<Shared>,
    zero_copy: bool,
    notifications: u64,
    useful_notifications: u64,
    in_chain: usize,
    enters: u64,
    broken: Option<i32>,
    latencies: Latencies,
    notified: Notified,
}

impl Sender {
    /// A sender for one lane, which must stay on the calling thread.
    pub fn new(
        setup: SenderSetup,
        filled: Consumer<FilledSlot>,
        free: Producer<Slot>,
        shared: Arc<Shared>,
    ) -> Result<Self, SendError> {
        let slots = setup.pool.slots() as usize;
        let requests = slots * REQUESTS_PER_SLOT;
        let entries = (CHAIN_SLOTS * REQUESTS_PER_SLOT).max(slots * 2).next_power_of_two() as u32;
        let mut ring = SendRing::new(setup.socket.as_raw_fd(), entries).map_err(SendError::Setup)?;
        let registered = match setup.zero_copy.then(|| register(&mut ring, &setup)) {
            Some(Ok(())) => true,
            Some(Err(error)) if !setup.may_fall_back => return Err(SendError::Register(error)),
            // Zero-copy sends from memory that is not registered are charged one by one to the same limit that was in
            // the way here, and fail in the middle of a migration: copying is the way to go.
            Some(Err(_)) | None => false,
        };
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let messages = (0..slots)
            .map(|_| Message {
                // SAFETY: an all-zero msghdr is a valid message without name, data or control.
                header: unsafe { std::mem::zeroed() },
                parts: Box::new([empty; BATCH_PAGES + 1]),
            })
            .collect();
        Ok(Sender {
            ring,
            ledger: Ledger::new(slots, requests),
            messages,
            registered,
            pacer: Pacer::new(setup.bytes_per_s),
            started: Instant::now(),
            filled,
            free,
            shared,
            zero_copy: registered,
            notifications: 0,
            useful_notifications: 0,
            in_chain: 0,
            enters: 0,
            broken: None,
            latencies: Latencies::of(if registered { &[Stage::Send, Stage::Notify] } else { &[Stage::Send] }),
            notified: Notified::new(slots),
            setup,
        })
    }

    /// Runs until the mapper is done and everything is sent and let go, or until the lane breaks.
    pub fn run(mut self) -> Result<SenderReport, SendError> {
        // What setting up took, registering above all, is no part of the migration.
        let set_up = cpu::thread_cpu_time();
        let result = self.send_all();
        if result.is_err() {
            self.shared.abort();
            self.abandon();
        }
        result.map(|()| SenderReport {
            bytes: self.ledger.counters(),
            fell_back: self.registered && !self.zero_copy,
            registered: self.registered,
            enters: self.enters,
            cpu: cpu::thread_cpu_time().saturating_sub(set_up),
            latencies: self.latencies,
        })
    }

    fn send_all(&mut self) -> Result<(), SendError> {
        let mut idle = self.shared.idle();
        loop {
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
            match self.filled.pop() {
                Ok(first) => {
                    idle.worked();
                    self.send_chain(first)?;
                }
                Err(PopError::Empty) => self.wait_for_work(&mut idle)?,
                Err(PopError::Closed) => break,
            }
        }
        // Nobody has to wait for the notifications, which come when the other side acknowledges.
        self.shared.note_all_sent(self.setup.lane);
        while self.ledger.requests_in_flight() > 0 {
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
            self.enter(1, PATIENCE)?;
            self.reap()?;
        }
        Ok(())
    }

    fn wait_for_work(&mut self, idle: &mut Idle) -> Result<(), SendError> {
        if self.ledger.requests_in_flight() > 0 {
            // Completions are only delivered to a thread that asks for them; the wait doubles as the nap.
            self.enter(1, idle.nap())?;
            self.reap()
        } else {
            idle.wait(Duration::MAX);
            Ok(())
        }
    }

    fn enter(&mut self, want: usize, timeout: Duration) -> Result<(), SendError> {
        self.enters += 1;
        self.ring.submit_and_wait(want, timeout).map_err(SendError::Ring)
    }

    /// Sends `first` and what else is there and due, as one linked chain, and waits until it is on the socket.
    fn send_chain(&mut self, first: FilledSlot) -> Result<(), SendError> {
        self.wait_for_turn()?;
        let mut next = Some(first);
        let mut chain = [None; CHAIN_SLOTS];
        let (mut length, mut entries, mut data_pages, mut bytes) = (0, 0, 0, 0);
        while let Some(filled) = next.take() {
            entries += u64::from(filled.payload().entries);
            data_pages += u64::from(filled.payload().data_pages);
            let slot_bytes = wire_bytes(&filled);
            self.pacer.sent(self.pacer.since(self.started), slot_bytes);
            bytes += slot_bytes;
            let ticket = match self.ledger.begin(filled) {
                Ok(ticket) => ticket,
                Err(_) => unreachable!("the ledger has room for every slot there is"),
            };
            chain[length] = Some(ticket);
            length += 1;
            if length < CHAIN_SLOTS && self.pacer.delay(self.pacer.since(self.started)).is_zero() {
                next = self.filled.pop().ok();
            }
        }
        let begun = Instant::now();
        let tickets: [Option<TicketId>; CHAIN_SLOTS] = chain;
        for (index, ticket) in tickets.iter().flatten().enumerate() {
            self.queue(*ticket, index + 1 == length)?;
        }
        while self.in_chain > 0 {
            self.enter(self.in_chain, PATIENCE)?;
            self.reap()?;
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
        }
        self.latencies.note(Stage::Send, begun.elapsed(), length as u64);
        self.shared.lanes[self.setup.lane].note_sent(entries, data_pages, bytes);
        Ok(())
    }

    fn wait_for_turn(&mut self) -> Result<(), SendError> {
        loop {
            let delay = self.pacer.delay(self.pacer.since(self.started));
            if delay.is_zero() {
                return Ok(());
            }
            if self.ledger.requests_in_flight() > 0 {
                self.enter(1, delay.min(PATIENCE))?;
                self.reap()?;
            } else {
                std::thread::sleep(delay.min(PATIENCE));
            }
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
        }
    }

    /// Queues the requests of one slot; the chain goes on behind them unless this is its `last`.
    fn queue(&mut self, ticket: TicketId, last: bool) -> Result<(), SendError> {
        let filled = self.ledger.slot(ticket).ok_or(LedgerError::UnknownTicket(ticket))?;
        let head = filled.bytes();
        let (head, head_len) = (head.as_ptr(), head.len() as u32);
        let external = !filled.payload().external.as_slice().is_empty();
        let slot_buffer = Some(0);
        match (external, self.zero_copy) {
            (false, true) => {
                let op = SendOp::ZeroCopy { data: head, len: head_len, buffer: slot_buffer };
                self.request(ticket, SendKind::ZeroCopy, head_len, op, !last)?;
            }
            (false, false) => {
                let op = SendOp::Plain { data: head, len: head_len, more: !last };
                self.request(ticket, SendKind::Plain, head_len, op, !last)?;
            }
            (true, true) => {
                // The head by a copying send of its own, as small things are, and the pages from where they are.
                let op = SendOp::Plain { data: head, len: head_len, more: true };
                self.request(ticket, SendKind::Plain, head_len, op, true)?;
                let (op, len) = self.pages_op(ticket)?;
                self.request(ticket, SendKind::ZeroCopy, len, op, !last)?;
            }
            (true, false) => {
                let (msg, pages_len) = self.message(ticket, true)?;
                let op = SendOp::PlainMsg { msg };
                self.request(ticket, SendKind::Plain, head_len + pages_len, op, !last)?;
            }
        }
        // A slot sealed before its requests are submitted cannot be free yet.
        self.ledger.seal(ticket)?;
        Ok(())
    }

    fn request(
        &mut self,
        ticket: TicketId,
        kind: SendKind,
        bytes: u32,
        op: SendOp,
        link: bool,
    ) -> Result<(), SendError> {
        let id = self.ledger.expect(ticket, kind, bytes)?;
        // SAFETY: the op points into the slot, which the ledger keeps until its last completion; into guest memory
        // and into this slot's message, which live as long as the sender; and the sender ends only after all
        // completions (`abandon`).
        unsafe { self.ring.queue(op, link, id.0) }.map_err(SendError::Ring)?;
        self.in_chain += 1;
        Ok(())
    }

    /// The zero-copy send of a record's external pages: one range if they are consecutive.
    fn pages_op(&mut self, ticket: TicketId) -> Result<(SendOp, u32), SendError> {
        let guest = self.setup.guest.clone();
        let (Some(guest), Some(filled)) = (guest, self.ledger.slot(ticket)) else {
            return Err(LedgerError::UnknownTicket(ticket).into());
        };
        let runs = filled.payload().external.as_slice();
        let (first, count) = runs[0];
        let last = runs[runs.len() - 1];
        let begin = first.index() * PAGE_SIZE;
        let end = (last.0.index() + last.1 as usize) * PAGE_SIZE;
        let same_piece = begin / MAX_REGISTERED_BYTES == (end - 1) / MAX_REGISTERED_BYTES;
        let piece = 1 + (begin / MAX_REGISTERED_BYTES) as u16;
        let buffer = same_piece.then_some(piece);
        if runs.len() == 1 {
            let len = count * PAGE_SIZE as u32;
            return Ok((SendOp::ZeroCopy { data: guest.page(first), len, buffer }, len));
        }
        let (msg, len) = self.message(ticket, false)?;
        Ok((SendOp::ZeroCopyMsg { msg, buffer: buffer.filter(|_| self.setup.fixed_messages) }, len))
    }

    /// Lays out the message of a slot's external pages, behind the record's head if `with_head`. Returns it with the
    /// number of bytes in the pages.
    fn message(
        &mut self,
        ticket: TicketId,
        with_head: bool,
    ) -> Result<(*const libc::msghdr, u32), SendError> {
        let (Some(guest), Some(filled)) = (&self.setup.guest, self.ledger.slot(ticket)) else {
            return Err(LedgerError::UnknownTicket(ticket).into());
        };
        let message = &mut self.messages[filled.range_in_pool().start / self.setup.pool.slot_bytes()];
        let mut parts = 0;
        if with_head {
            let head = filled.bytes();
            message.parts[0] = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
            parts = 1;
        }
        let mut bytes = 0;
        for (first, count) in filled.payload().external.as_slice() {
            let len = *count as usize * PAGE_SIZE;
            message.parts[parts] =
                libc::iovec { iov_base: guest.page(*first).cast_mut().cast(), iov_len: len };
            parts += 1;
            bytes += len as u32;
        }
        message.header.msg_iov = message.parts.as_mut_ptr();
        message.header.msg_iovlen = parts;
        Ok((&raw const message.header, bytes))
    }

    /// Takes in all completions that are there, and gives slots back.
    fn reap(&mut self) -> Result<(), SendError> {
        // Once for all that is there: it has come since the last time that anybody looked.
        let now = self.registered.then(Instant::now);
        while let Some(entry) = self.ring.next_completion() {
            let posted = Posted::from_cqe(entry.result, entry.flags);
            let completion = match self.ledger.on_completion(entry.id, posted) {
                // The cancelled rest of a broken chain posts notifications that it did not announce. They stand for
                // nothing: a cancelled request has sent no byte.
                Err(LedgerError::UnknownRequest(_)) if self.broken.is_some() => continue,
                other => other?,
            };
            match completion.outcome {
                Outcome::Sent(_) => self.in_chain -= 1,
                Outcome::Notified => self.note_notification(posted),
                Outcome::Short { .. } | Outcome::Failed(_) => {
                    self.in_chain -= 1;
                    let errno = match completion.outcome {
                        Outcome::Failed(errno) => errno,
                        _ => libc::EPIPE,
                    };
                    // The rest of a chain is cancelled; the head says why.
                    if self.broken.is_none_or(|known| known == libc::ECANCELED) {
                        self.broken = Some(errno);
                    }
                    self.ledger.seal(completion.ticket)?;
                }
            }
            if let Some(now) = now {
                self.note_time(&completion, now);
            }
            if let Some(filled) = completion.freed {
                give_back(&mut self.free, filled);
            }
        }
        match self.broken {
            Some(errno) => Err(SendError::Connection(std::io::Error::from_raw_os_error(errno))),
            None => Ok(()),
        }
    }

    /// Notes when a slot's sends were completed, and how long its notification took from there.
    fn note_time(&mut self, completion: &Completion<FilledSlot>, now: Instant) {
        let of = completion.freed.as_ref().or_else(|| self.ledger.slot(completion.ticket));
        let Some(filled) = of else { return };
        let slot = filled.range_in_pool().start / self.setup.pool.slot_bytes();
        match completion.outcome {
            Outcome::Sent(_) => self.notified.sent(slot, now),
            Outcome::Notified => self.latencies.note(Stage::Notify, self.notified.since_sent(slot, now), 1),
            Outcome::Short { .. } | Outcome::Failed(_) => {}
        }
    }

    fn note_notification(&mut self, posted: Posted) {
        self.notifications += 1;
        self.useful_notifications += u64::from(posted == Posted::Notification { copied: false });
        if self.setup.may_fall_back && self.useful_notifications == 0 && self.notifications >= FALL_BACK_AFTER
        {
            self.zero_copy = false;
        }
    }

    /// Ends with requests in flight: stays until the kernel has let go of every byte, and cuts the connection to
    /// make it do so.
    fn abandon(&mut self) {
        let _ = self.setup.socket.shutdown(Shutdown::Write);
        let since = Instant::now();
        let mut cut = false;
        while self.ledger.requests_in_flight() > 0 {
            if !cut && (self.broken.is_none() || since.elapsed() > DRAIN_PATIENCE) {
                let _ = socket::disconnect(&self.setup.socket);
                cut = true;
            }
            if self.enter(1, PATIENCE).is_err() {
                break;
            }
            let _ = self.reap();
        }
        if self.ledger.requests_in_flight() > 0 {
            // The ring itself has failed. What the kernel may still read must never be reused: it is left alone.
            std::mem::forget(self.setup.pool.clone());
            std::mem::forget(self.setup.guest.clone());
        }
    }
}

/// Registers the slots as buffer 0 and, in direct mode, guest memory as the buffers behind it, in pieces that the kernel
/// takes.
fn register(ring: &mut SendRing, setup: &SenderSetup) -> std::io::Result<()> {
    let slots =
        libc::iovec { iov_base: setup.pool.as_ptr().cast_mut().cast(), iov_len: setup.pool.total_bytes() };
    let piece = |guest: &GuestMemory, begin: usize| libc::iovec {
        iov_base: guest.base().wrapping_add(begin).cast(),
        iov_len: MAX_REGISTERED_BYTES.min(guest.len() - begin),
    };
    let guest = setup.guest.iter().flat_map(|guest| {
        (0..guest.len()).step_by(MAX_REGISTERED_BYTES).map(move |begin| piece(guest, begin))
    });
    let all: Vec<_> = std::iter::once(slots).chain(guest).collect();
    // SAFETY: pool and guest memory are held by `setup`, which the sender keeps for as long as its ring.
    unsafe { ring.register(&all) }
}

/// Bytes that a filled slot puts on the wire.
fn wire_bytes(filled: &FilledSlot) -> u64 {
    let external: u64 = filled.payload().external.as_slice().iter().map(|(_, count)| u64::from(*count)).sum();
    filled.bytes().len() as u64 + external * PAGE_SIZE as u64
}
