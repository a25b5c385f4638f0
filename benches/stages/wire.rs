//! The sender over a TCP connection on loopback, and its account of what is in flight.
//!
//! Loopback copies whatever is asked for, and does a part of the receiver's work on the sender's time: the bare operation, a
//! blocking write of the same bytes, does so too.

use std::cell::RefCell;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use pagecast::pipeline::batch::{BATCH_PAGES, FilledSlot, RecordInfo, Runs};
use pagecast::pipeline::ring::ring;
use pagecast::pipeline::sender::{Sender, SenderSetup};
use pagecast::pipeline::shared::Shared;
use pagecast::pipeline::slots::{Slot, SlotPool};
use pagecast::transport::ledger::{Ledger, Posted, SendKind};

use crate::data_path::{BATCHES, slots};
use crate::{Used, measure};

const PAGES: usize = BATCHES * BATCH_PAGES;

/// A connection whose other end takes in everything.
fn drained() -> (TcpStream, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
    let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (mut far, _) = listener.accept().expect("the connection");
    let drain = std::thread::spawn(move || {
        let mut block = vec![0; 1 << 20];
        while far.read(&mut block).is_ok_and(|got| got > 0) {}
    });
    (near, drain)
}

/// Has a sender send all slots, and gives them back.
fn send(socket: &Arc<TcpStream>, pool: &SlotPool, zero_copy: bool, slots: &mut Vec<Slot>) -> Used {
    let (mut filled_in, filled) = ring(BATCHES);
    let (free, mut free_out) = ring(BATCHES);
    for slot in slots.drain(..) {
        let whole = 0..slot.size();
        let info =
            RecordInfo { entries: BATCH_PAGES as u32, data_pages: BATCH_PAGES as u32, external: Runs::new() };
        let filled = FilledSlot::new(slot, whole, info).ok().expect("the whole slot");
        assert!(filled_in.push(filled).is_ok(), "room for every slot");
    }
    drop(filled_in);
    let setup = SenderSetup {
        socket: socket.clone(),
        lane: 0,
        pool: pool.clone(),
        guest: None,
        zero_copy,
        fixed_messages: false,
        may_fall_back: false,
        bytes_per_s: None,
    };
    let sender = Sender::new(setup, filled, free, Arc::new(Shared::new(1, false))).expect("io_uring");
    let took = Used::by(|| _ = black_box(sender.run().expect("an open connection")));
    slots.extend(std::iter::from_fn(|| free_out.pop().ok()));
    assert_eq!(slots.len(), BATCHES, "every slot came back");
    took
}

/// Measures sends with and without copying, and the ledger.
pub fn measure_all() {
    let (pool, slots) = slots();
    let slots = RefCell::new(slots);
    let (near, drain) = drained();
    let (bare_near, bare_drain) = drained();
    let near = Arc::new(near);
    for (zero_copy, name) in [(false, "copying sends"), (true, "zero-copy sends")] {
        let mut real = || send(&near, &pool, zero_copy, &mut slots.borrow_mut());
        let mut bare = || {
            Used::by(|| {
                for slot in &*slots.borrow() {
                    (&bare_near).write_all(slot.bytes()).expect("an open connection");
                }
            })
        };
        let stage = format!("submit + complete, {name}");
        measure(&stage, "write(2) of the slots", PAGES, &mut real, Some(&mut bare));
    }
    drop((near, bare_near));
    drain.join().expect("it only reads");
    bare_drain.join().expect("it only reads");
    account();
}

/// What keeping the account of a slot costs, without the kernel.
fn account() {
    let mut ledger = Ledger::new(BATCHES, BATCHES);
    let bytes = 1 << 18;
    let mut real = || {
        Used::by(|| {
            for slot in 0..BATCHES {
                let ticket = ledger.begin(slot).expect("room for a slot");
                let id = ledger.expect(ticket, SendKind::Plain, bytes).expect("room for a request");
                ledger.seal(ticket).expect("a ticket that is open");
                let posted = Posted::Result { result: bytes as i32, more: false };
                let completion = ledger.on_completion(id.0, posted).expect("what was announced");
                assert!(black_box(completion).freed.is_some(), "the slot comes back");
            }
        })
    };
    measure("complete: the account alone", "none", PAGES, &mut real, None);
}
