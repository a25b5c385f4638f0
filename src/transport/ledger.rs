//! What the kernel may still read: the sender's account of its requests and of the slots they cover.
//!
//! Pure: the sender tells it which requests it submits and which completions it reaps, and gets each slot back at
//! the moment when it may be filled again. The rules are io_uring's:
//!
//! * A request posts a first completion: the bytes queued on the socket, or an error. If it has the flag MORE, a
//!   second one will come, the notification. The flag decides, not the result: a failed send can owe one too.
//! * Notifications come late (after the peer's TCP acknowledgement) and in any order.
//!
//! What always holds: a slot is given back once, when none of its requests owes anything and its ticket is sealed;
//! a completion that does not fit is an error and changes nothing; nothing is allocated after [`Ledger::new`].

/// Bit 31 of a notification's result: the kernel copied the bytes after all (`IORING_NOTIF_USAGE_ZC_COPIED` in
/// linux/io_uring.h). Only set if the request asked for it with `IORING_SEND_ZC_REPORT_USAGE`.
const NOTIFICATION_COPIED: i32 = 1 << 31;

/// A slot that is being sent. Names it until it is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TicketId(u64);

/// A request: its `user_data`. Never 0, and below 2^63, so that bit 63 can mark requests of other kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// The kind of a request, which says whether it can owe a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendKind {
    /// SEND, SENDMSG, WRITEV: one completion.
    Plain,
    /// SEND_ZC, SENDMSG_ZC: a notification too if the first completion says so.
    ZeroCopy,
}

/// One completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// The first for its request.
    Result {
        /// Bytes queued on the socket, or a negated errno.
        result: i32,
        /// A notification will follow.
        more: bool,
    },
    /// The second: the kernel no longer reads the bytes.
    Notification {
        /// It had copied them.
        copied: bool,
    },
}

impl Posted {
    /// Reads the `res` and `flags` of an entry.
    pub fn from_cqe(res: i32, flags: u32) -> Self {
        match io_uring::cqueue::notif(flags) {
            true => Self::Notification { copied: res & NOTIFICATION_COPIED != 0 },
            false => Self::Result { result: res, more: io_uring::cqueue::more(flags) },
        }
    }
}

/// What a completion means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of the request's bytes, this many, are queued on the socket.
    Sent(u32),
    /// Only some are. The ticket is open again.
    Short {
        /// How many are queued.
        sent: u32,
        /// How many are not.
        missing: u32,
    },
    /// None are, for this errno (ECANCELED: an earlier request of its chain fell short). The ticket is open again.
    Failed(i32),
    /// The kernel is done with bytes that were accounted for earlier.
    Notified,
}

/// What [`Ledger::on_completion`] makes of a completion.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "it may hold a slot"]
pub struct Completion<S> {
    /// The slot that it concerns.
    pub ticket: TicketId,
    /// What it means for the request.
    pub outcome: Outcome,
    /// The slot, if this was the last thing it waited for. The ticket is then void.
    pub freed: Option<S>,
}

/// What does not fit the account. Nothing has been changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// No such request is in flight: never made, or it has had all its completions.
    #[error("completion for {0:#x}, which is not in flight")]
    UnknownRequest(u64),
    /// No such slot is being sent.
    #[error("slot ticket {0:?} is not in use")]
    UnknownTicket(TicketId),
    /// The slot's requests have all been announced.
    #[error("slot ticket {0:?} is sealed: no more requests")]
    Sealed(TicketId),
    /// As many requests are in flight as the ledger has room for.
    #[error("{0} requests are in flight: no room for another")]
    Full(usize),
    /// A second result, a notification before the result or for a plain send, or more bytes than there were.
    #[error("request {0:#x} cannot have posted {1:?} now")]
    Misfit(u64, Posted),
}

/// What has been sent, in bytes. Bytes count when they are queued on the socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// By zero-copy requests.
    pub zero_copy_bytes: u64,
    /// Of those, bytes that the kernel copied all the same. Counted when the notification says so.
    pub copied_bytes: u64,
    /// By plain requests.
    pub plain_bytes: u64,
}

struct Ticket<S> {
    slot: S,
    /// More requests may come.
    open: bool,
    /// Requests that still owe a completion.
    owing: u32,
}

struct Request {
    ticket: TicketId,
    kind: SendKind,
    bytes: u32,
    /// What the first completion said was sent, once it has come; then only the notification is due.
    sent: Option<u32>,
}

/// The account. `S` is the slot's handle, which the ledger keeps while requests cover the slot.
pub struct Ledger<S> {
    tickets: Table<Ticket<S>>,
    requests: Table<Request>,
    counters: Counters,
}

impl<S> Ledger<S> {
    /// An account with room for `slots` slots and `requests` requests at a time, notifications due included.
    pub fn new(slots: usize, requests: usize) -> Self {
        Self { tickets: Table::new(slots), requests: Table::new(requests), counters: Counters::default() }
    }

    /// Takes a slot that is about to be sent, or gives it back if there is no room. Its ticket is open: the slot
    /// does not become free before the ticket is sealed.
    pub fn begin(&mut self, slot: S) -> Result<TicketId, S> {
        self.tickets.insert(Ticket { slot, open: true, owing: 0 }).map(TicketId).map_err(|ticket| ticket.slot)
    }

    /// The slot that a ticket stands for, to address requests from.
    pub fn slot(&self, ticket: TicketId) -> Option<&S> {
        self.tickets.get(ticket.0).map(|ticket| &ticket.slot)
    }

    /// Announces a request that covers `bytes` of the slot (or, behind its header in a chain, bytes elsewhere that
    /// are to stay until then). Call it before submitting. An error if the ticket is not open, or no room is left.
    pub fn expect(&mut self, ticket: TicketId, kind: SendKind, bytes: u32) -> Result<RequestId, LedgerError> {
        let entry = self.tickets.get_mut(ticket.0).ok_or(LedgerError::UnknownTicket(ticket))?;
        if !entry.open {
            return Err(LedgerError::Sealed(ticket));
        }
        let request = Request { ticket, kind, bytes, sent: None };
        let id = self.requests.insert(request).map_err(|_| LedgerError::Full(self.requests.len()))?;
        entry.owing += 1;
        Ok(RequestId(id))
    }

    /// Says that the slot's requests have all been announced; returns the slot if none of them owes anything.
    ///
    /// A request that comes back short or failed opens its ticket again, so that what is missing can be sent anew
    /// from the same slot: after each such outcome, announce more requests or not, but seal.
    pub fn seal(&mut self, ticket: TicketId) -> Result<Option<S>, LedgerError> {
        self.tickets.get_mut(ticket.0).ok_or(LedgerError::UnknownTicket(ticket))?.open = false;
        Ok(self.take_if_free(ticket))
    }

    /// Enters a completion. `user_data` is the [`RequestId`] it came with. An error if it does not fit what is in
    /// flight; nothing is changed then, and the slot stays where it is.
    pub fn on_completion(&mut self, user_data: u64, posted: Posted) -> Result<Completion<S>, LedgerError> {
        let request = self.requests.get_mut(user_data).ok_or(LedgerError::UnknownRequest(user_data))?;
        let ticket = request.ticket;
        let entry = self.tickets.get_mut(ticket.0).ok_or(LedgerError::UnknownTicket(ticket))?;
        let misfit = LedgerError::Misfit(user_data, posted);
        let (outcome, done) = match (posted, request.sent) {
            (Posted::Result { result, more }, None) => {
                let outcome = request.outcome(result, more).ok_or(misfit)?;
                let sent = u32::try_from(result).unwrap_or(0);
                request.sent = Some(sent);
                match request.kind {
                    SendKind::Plain => self.counters.plain_bytes += u64::from(sent),
                    SendKind::ZeroCopy => self.counters.zero_copy_bytes += u64::from(sent),
                }
                (outcome, !more)
            }
            (Posted::Notification { copied }, Some(sent)) => {
                self.counters.copied_bytes += if copied { u64::from(sent) } else { 0 };
                (Outcome::Notified, true)
            }
            _ => return Err(misfit),
        };
        entry.open |= matches!(outcome, Outcome::Short { .. } | Outcome::Failed(_));
        if done {
            entry.owing -= 1;
            self.requests.remove(user_data);
        }
        Ok(Completion { ticket, outcome, freed: self.take_if_free(ticket) })
    }

    /// What has been sent so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Slots that have not been given back.
    pub fn slots_in_flight(&self) -> usize {
        self.tickets.len()
    }

    /// Requests that still owe a completion: how many entries the completion queue may yet get is at most twice that.
    pub fn requests_in_flight(&self) -> usize {
        self.requests.len()
    }

    fn take_if_free(&mut self, ticket: TicketId) -> Option<S> {
        let free = self.tickets.get(ticket.0).is_some_and(|entry| !entry.open && entry.owing == 0);
        if free { self.tickets.remove(ticket.0).map(|ticket| ticket.slot) } else { None }
    }
}

impl Request {
    /// What a first completion means for this request; `None` if it cannot be one of it.
    fn outcome(&self, result: i32, more: bool) -> Option<Outcome> {
        if more && self.kind == SendKind::Plain {
            return None;
        }
        let Ok(sent) = u32::try_from(result) else {
            return Some(Outcome::Failed(result.saturating_neg()));
        };
        let missing = self.bytes.checked_sub(sent)?;
        Some(if missing == 0 { Outcome::Sent(sent) } else { Outcome::Short { sent, missing } })
    }
}

/// A table of fixed size whose keys are not reused soon: 32 bits of index below 31 bits that count how often the
/// entry has been used. An old key then finds nothing, rather than what took its place.
struct Table<V> {
    entries: Vec<(u32, Option<V>)>,
    free: Vec<u32>,
}

impl<V> Table<V> {
    fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
        Self { entries: (0..capacity).map(|_| (0, None)).collect(), free: (0..capacity).rev().collect() }
    }

    fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    fn insert(&mut self, value: V) -> Result<u64, V> {
        let Some(index) = self.free.pop() else { return Err(value) };
        let (uses, entry) = &mut self.entries[index as usize];
        // From 1, so that no key is 0.
        *uses = *uses % (i32::MAX as u32) + 1;
        *entry = Some(value);
        Ok(u64::from(*uses) << 32 | u64::from(index))
    }

    fn get(&self, key: u64) -> Option<&V> {
        self.entries.get(key as u32 as usize).filter(|(uses, _)| u64::from(*uses) == key >> 32)?.1.as_ref()
    }

    fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        self.entries
            .get_mut(key as u32 as usize)
            .filter(|(uses, _)| u64::from(*uses) == key >> 32)?
            .1
            .as_mut()
    }

    fn remove(&mut self, key: u64) -> Option<V> {
        self.get(key)?;
        self.free.push(key as u32);
        self.entries[key as u32 as usize].1.take()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::{prelude::*, sample::Index};

    use super::*;

    #[test]
    fn entries_of_the_completion_queue_are_read_as_the_kernel_means_them() {
        assert_eq!(Posted::from_cqe(-32, 2), Posted::Result { result: -32, more: true });
        assert_eq!(Posted::from_cqe(7, 0), Posted::Result { result: 7, more: false });
        assert_eq!(Posted::from_cqe(0, 8), Posted::Notification { copied: false });
        assert_eq!(Posted::from_cqe(i32::MIN, 8), Posted::Notification { copied: true });
    }

    /// A request of 8 bytes, and all that it has posted.
    struct Made {
        slot: usize,
        id: u64,
        kind: SendKind,
        posted: Vec<Posted>,
    }

    impl Made {
        fn done(&self) -> bool {
            self.posted.len() == 2 || matches!(self.posted[..], [Posted::Result { more: false, .. }])
        }

        /// What `posted` would mean if it came next; `None` if it cannot.
        fn next(&self, posted: Posted) -> Option<Outcome> {
            match (posted, self.posted.len()) {
                (Posted::Notification { .. }, 1) if !self.done() => Some(Outcome::Notified),
                (Posted::Result { result, more }, 0) if !(more && self.kind == SendKind::Plain) => {
                    match result {
                        8 => Some(Outcome::Sent(8)),
                        0..8 => Some(Outcome::Short { sent: result as u32, missing: 8 - result as u32 }),
                        _ => (result < 0).then_some(Outcome::Failed(-result)),
                    }
                }
                _ => None,
            }
        }
    }

    proptest! {
        /// Any completions in any order, also impossible ones, for any request there ever was.
        #[test]
        fn a_slot_is_given_back_once_and_only_when_nothing_covers_it(
            steps in prop::collection::vec((0..6u8, any::<Index>(), -2..17i32, any::<bool>()), 1..120),
        ) {
            let mut ledger = Ledger::new(3, 5);
            // By slot, named by its place here: its ticket, whether that is open, whether the slot has come back.
            let mut slots: Vec<(TicketId, bool, bool)> = Vec::new();
            let (mut made, mut counters) = (Vec::<Made>::new(), Counters::default());
            for (step, which, number, flag) in steps {
                let out = slots.iter().filter(|slot| !slot.2).count();
                let owing = made.iter().filter(|request| !request.done()).count();
                prop_assert_eq!((ledger.slots_in_flight(), ledger.requests_in_flight()), (out, owing));
                let mut freed = None;
                let at = which.index(slots.len().max(1));
                if step == 0 || slots.is_empty() {
                    let begun = ledger.begin(slots.len());
                    prop_assert_eq!(begun.is_ok(), out < 3);
                    slots.extend(begun.ok().map(|ticket| (ticket, true, false)));
                } else if step == 1 || made.is_empty() {
                    let kind = if flag { SendKind::ZeroCopy } else { SendKind::Plain };
                    let id = ledger.expect(slots[at].0, kind, 8);
                    prop_assert_eq!(id.is_ok(), slots[at].1 && !slots[at].2 && owing < 5);
                    made.extend(id.ok().map(|id| Made { slot: at, id: id.0, kind, posted: vec![] }));
                } else if step == 2 {
                    let sealed = ledger.seal(slots[at].0);
                    prop_assert_eq!(sealed.is_ok(), !slots[at].2);
                    slots[at].1 = false;
                    freed = sealed.ok().flatten();
                } else {
                    let request = which.get_mut(&mut made);
                    let posted = match step {
                        3 => Posted::Notification { copied: flag },
                        _ => Posted::Result { result: if number > 9 { 8 } else { number }, more: flag },
                    };
                    let entered = ledger.on_completion(request.id, posted).ok();
                    prop_assert_eq!(entered.as_ref().map(|entered| entered.outcome), request.next(posted));
                    if let Some(entered) = entered {
                        request.posted.push(posted);
                        slots[request.slot].1 |= step != 3 && number < 8;
                        let Posted::Result { result, .. } = request.posted[0] else { unreachable!() };
                        let sent = result.max(0) as u64;
                        match (request.posted.len(), request.kind) {
                            (1, SendKind::Plain) => counters.plain_bytes += sent,
                            (1, SendKind::ZeroCopy) => counters.zero_copy_bytes += sent,
                            _ => counters.copied_bytes += if flag { sent } else { 0 },
                        }
                        freed = entered.freed;
                    }
                }
                // What should be free now has just come back, and nothing else has.
                let covered = |at| made.iter().any(|request| request.slot == at && !request.done());
                let due = (0..slots.len()).find(|&at| !slots[at].1 && !slots[at].2 && !covered(at));
                prop_assert_eq!((freed, ledger.counters()), (due, counters));
                due.into_iter().for_each(|at| slots[at].2 = true);
            }
        }
    }
}
