//! Models of a slot's life: free -> filled -> in flight -> free, through the real rings and the real ledger, with a
//! thread each for the mapper, the sender and a kernel that is as late as it likes. The queues between sender and
//! kernel are loom's channels: entering the kernel orders both sides, and io_uring is not what is under test.
//! (With rings there too all three threads poll, and two preemptions take loom past 10,000 branches.)
//!
//! A slot's memory is one loom cell, which loom watches: if the mapper writes while the kernel may still read, with
//! no order between the two, the model fails. The invariants, for all models here:
//!
//! 1. No byte of a slot is written while a request covers it.
//! 2. Each slot is in exactly one place: free ring, mapper, filled ring, ledger.
//! 3. What the kernel reads, at any time until its notification, is what the mapper wrote for that request.
//! 4. In the end every slot is free again.

use std::array;

use loom::{sync::mpsc, thread};

use super::ring::{Consumer, PopError, Producer, PushError, ring};
use super::sync::{Arc, UnsafeCell, yield_now};
use crate::transport::ledger::{Ledger, Outcome, Posted, SendKind};

const SLOTS: usize = 2;
const BYTES: u32 = 1;

/// The slots' memory.
type Memory = Arc<[UnsafeCell<u32>; SLOTS]>;

/// The unique handle of a slot: what `Slot` is outside the model.
struct Token(usize);

/// A request as the kernel gets it: an address and a name, no handle.
struct Sqe {
    request: u64,
    slot: usize,
    /// What the slot must hold for as long as the kernel reads it.
    content: u32,
}

/// A completion: the request's name and what it posted.
type Cqe = (u64, Posted);

fn push<T>(producer: &mut Producer<T>, mut item: T) {
    while let Err(PushError::Full(back)) = producer.push(item) {
        item = back;
        yield_now();
    }
}

fn pop<T>(consumer: &mut Consumer<T>) -> Option<T> {
    loop {
        match consumer.pop() {
            Ok(item) => return Some(item),
            Err(PopError::Empty) => yield_now(),
            Err(PopError::Closed) => return None,
        }
    }
}

/// Fills `fills` slots, each as soon as one is free; returns the free ring.
fn map_pages(
    memory: &Memory,
    fills: u32,
    mut free: Consumer<Token>,
    mut filled: Producer<(Token, u32)>,
) -> Consumer<Token> {
    for content in 1..=fills {
        let token = pop(&mut free).expect("the sender outlives the mapper");
        // SAFETY: there is one token for the slot, and this thread has it. Loom checks just that.
        memory[token.0].with_mut(|slot| unsafe { *slot = content });
        push(&mut filled, (token, content));
    }
    free
}

/// Reads a slot as the network card would.
fn read_slot(memory: &Memory, sqe: &Sqe) {
    // SAFETY: the request has not been notified, so nobody may write. Loom checks just that.
    assert_eq!(memory[sqe.slot].with(|slot| unsafe { *slot }), sqe.content, "slot changed while in flight");
}

/// How the kernel treats requests.
#[derive(Clone, Copy)]
struct Kernel {
    /// The result of every request.
    result: i32,
    /// How many requests' notifications it holds back, to post the newest first.
    held: usize,
}

impl Kernel {
    /// Serves requests until there are no more (`None`).
    fn run(self, memory: &Memory, submitted: &mpsc::Receiver<Option<Sqe>>, completed: &mpsc::Sender<Cqe>) {
        let mut held: Vec<Sqe> = Vec::with_capacity(self.held + 1);
        loop {
            let next = submitted.recv().unwrap();
            let last = next.is_none();
            if let Some(sqe) = next {
                completed.send((sqe.request, Posted::Result { result: self.result, more: true })).unwrap();
                held.push(sqe);
            }
            while held.len() > self.held || last && !held.is_empty() {
                let sqe = held.pop().unwrap();
                // The first completion is out, and the bytes are still being read.
                read_slot(memory, &sqe);
                completed.send((sqe.request, Posted::Notification { copied: false })).unwrap();
            }
            if last {
                return;
            }
        }
    }
}

/// The sender: its ends of the rings, and its queues to and from the kernel.
struct Sender {
    filled: Consumer<(Token, u32)>,
    free: Producer<Token>,
    submit: mpsc::Sender<Option<Sqe>>,
    complete: mpsc::Receiver<Cqe>,
    ledger: Ledger<Token>,
}

impl Sender {
    /// Sends until there is nothing more to come. Takes filled slots as long as there can be any, and waits for the
    /// kernel only when every slot is in flight, or at the end.
    fn run(mut self, slots: usize, result: i32) {
        let mut mapper_at_work = true;
        while mapper_at_work || self.ledger.slots_in_flight() > 0 {
            if mapper_at_work && self.ledger.slots_in_flight() < slots {
                match pop(&mut self.filled) {
                    Some((token, content)) => self.send(token, content),
                    None => {
                        mapper_at_work = false;
                        self.submit.send(None).unwrap();
                    }
                }
            } else {
                self.reap(result);
            }
        }
        assert_eq!(self.ledger.requests_in_flight(), 0);
    }

    fn send(&mut self, token: Token, content: u32) {
        let slot = token.0;
        let ticket = self.ledger.begin(token).ok().expect("as many tickets as slots");
        let request = self.ledger.expect(ticket, SendKind::ZeroCopy, BYTES).unwrap().0;
        assert!(self.ledger.seal(ticket).unwrap().is_none());
        self.submit.send(Some(Sqe { request, slot, content })).unwrap();
    }

    fn reap(&mut self, result: i32) {
        let (request, posted) = self.complete.recv().unwrap();
        let completion = self.ledger.on_completion(request, posted).unwrap();
        let mut freed = completion.freed;
        match completion.outcome {
            Outcome::Notified => {}
            Outcome::Failed(errno) => {
                assert_eq!(errno, -result);
                freed = self.ledger.seal(completion.ticket).unwrap();
            }
            outcome => assert_eq!(outcome, Outcome::Sent(BYTES)),
        }
        if let Some(token) = freed {
            push(&mut self.free, token);
        }
    }
}

/// One run: `fills` slots' worth of pages through `slots` slots.
fn slot_cycle(slots: usize, fills: u32, kernel: Kernel) {
    let memory: Memory = Arc::new(array::from_fn(|_| UnsafeCell::new(0)));
    let (mut free, free_tokens) = ring(2);
    let (to_sender, filled) = ring(2);
    let (submit, submitted) = mpsc::channel();
    let (completed, complete) = mpsc::channel();
    (0..slots).for_each(|slot| push(&mut free, Token(slot)));

    let of_mapper = memory.clone();
    let mapper = thread::spawn(move || map_pages(&of_mapper, fills, free_tokens, to_sender));
    let kernel_thread = thread::spawn(move || kernel.run(&memory, &submitted, &completed));
    let ledger = Ledger::new(slots, slots);
    Sender { filled, free, submit, complete, ledger }.run(slots, kernel.result);

    kernel_thread.join().unwrap();
    let mut free_tokens = mapper.join().unwrap();
    let mut back: Vec<usize> = std::iter::from_fn(|| pop(&mut free_tokens)).map(|token| token.0).collect();
    back.sort_unstable();
    assert!(back.into_iter().eq(0..slots), "every slot is free again, once");
}

/// One slot, filled twice: the mapper waits for just the slot that the kernel is reading.
#[test]
fn loom_slots_a_slot_is_not_refilled_before_its_late_notification() {
    loom::model(|| slot_cycle(1, 2, Kernel { result: BYTES as i32, held: 0 }));
}

/// One slot, filled twice, and every send fails, but owes a notification all the same.
#[test]
fn loom_slots_a_failed_send_keeps_its_slot_until_the_notification() {
    loom::model(|| slot_cycle(1, 2, Kernel { result: -32, held: 0 }));
}

/// Two slots, filled three times in all, and the kernel posts the newer notification first.
#[test]
fn loom_slots_notifications_may_come_out_of_order() {
    loom::model(|| slot_cycle(2, 3, Kernel { result: BYTES as i32, held: 1 }));
}
