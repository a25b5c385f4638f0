//! Models of the ring: loom runs each under every interleaving of its threads (up to the preemption bound) and
//! every value that a load may return, and reports a cell that two threads are at without an order between them.

use std::sync::atomic::{AtomicUsize as Count, Ordering::Relaxed};

use loom::thread;

use super::ring::{Closed, Consumer, PopError, Producer, PushError, ring, ring_from};
use super::sync::{UnsafeCell, yield_now};

/// Pops until the ring is closed; spins while it is empty.
fn drain<T>(consumer: &mut Consumer<T>, mut each: impl FnMut(T)) {
    loop {
        match consumer.pop() {
            Ok(item) => each(item),
            Err(PopError::Empty) => yield_now(),
            Err(PopError::Closed) => return,
        }
    }
}

/// Pushes `item`; spins while the ring is full. False if the consumer is gone.
fn push<T>(producer: &mut Producer<T>, mut item: T) -> bool {
    loop {
        match producer.push(item) {
            Ok(()) => return true,
            Err(PushError::Full(back)) => item = back,
            Err(PushError::Closed(_)) => return false,
        }
        yield_now();
    }
}

/// An item that is counted when it is made and when it is dropped. The counters are std's: they are not part of
/// the model, and so cannot order anything in it.
struct Counted<'a> {
    dropped: &'a Count,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Relaxed);
    }
}

/// Counters for one run of a model; leaked, because loom's threads want `'static`.
fn counters() -> (&'static Count, impl FnMut() -> Counted<'static>) {
    let dropped: &'static Count = Box::leak(Box::new(Count::new(0)));
    (dropped, move || Counted { dropped })
}

/// Full, empty and wrap-around: more items than cells cross one by one while either end waits for the other, with
/// indices that pass `usize::MAX`. Invariants: no cell is written before its old item has been taken out or read
/// before its new one has been written; items arrive in order; `Closed` comes after the last item and not before.
#[test]
fn loom_ring_single_items_cross_in_order() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring_from(2, usize::MAX);
        let sender = thread::spawn(move || (0..4).for_each(|item| assert!(push(&mut producer, item))));
        let mut expected = 0;
        drain(&mut consumer, |item| {
            assert_eq!(item, expected);
            expected += 1;
        });
        assert_eq!(expected, 4);
        sender.join().unwrap();
    });
}

/// Batches: one publication covers several cells. Invariants: a published batch is wholly written, a batch given
/// back is wholly read; order holds across batches and single items.
#[test]
fn loom_ring_batches_cross_in_order() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(2);
        let sender = thread::spawn(move || {
            let mut items = 0..4;
            while !items.is_empty() {
                if producer.push_batch(&mut items) == Ok(0) {
                    yield_now();
                }
            }
        });
        let mut out = Vec::with_capacity(4);
        loop {
            match consumer.pop_batch(&mut out, 2) {
                Ok(count) => assert!((1..=2).contains(&count)),
                Err(PopError::Empty) => yield_now(),
                Err(PopError::Closed) => break,
            }
        }
        assert_eq!(out, [0, 1, 2, 3]);
        sender.join().unwrap();
    });
}

/// The producer pushes and leaves at once while the consumer is popping. Invariant: the consumer gets everything
/// that was pushed before it is told `Closed`, however the two race.
#[test]
fn loom_ring_producer_leaves_while_the_consumer_drains() {
    loom::model(|| {
        let (dropped, mut item) = counters();
        let (mut producer, mut consumer) = ring(2);
        let sender = thread::spawn(move || {
            assert!(producer.push(item()).is_ok());
            assert_eq!(producer.push_batch(&mut std::iter::once_with(item)), Ok(1));
        });
        let mut seen = 0;
        drain(&mut consumer, |_| seen += 1);
        assert_eq!((seen, dropped.load(Relaxed)), (2, 2));
        sender.join().unwrap();
    });
}

/// The consumer takes one item and leaves while the producer is pushing. Invariants: the producer is told and does
/// not spin for ever; every item is dropped exactly once, whether it was taken, left behind or given back.
#[test]
fn loom_ring_consumer_leaves_while_the_producer_pushes() {
    loom::model(|| {
        let (dropped, mut item) = counters();
        let (mut producer, mut consumer) = ring(2);
        let receiver = thread::spawn(move || {
            let _ = consumer.pop();
        });
        let mut made = 1;
        while push(&mut producer, item()) {
            made += 1;
        }
        assert!(made <= 4, "one popped, two left in the ring, one given back");
        receiver.join().unwrap();
        assert!(producer.is_closed());
        assert_eq!(producer.push_batch(&mut std::iter::once_with(&mut item)), Err(Closed));
        drop(producer);
        assert_eq!(dropped.load(Relaxed), made);
    });
}

/// Both ends are dropped, each by its own thread, with items in the ring. Invariant: the thread that comes last
/// drops what is left, once, and sees it whole.
#[test]
fn loom_ring_both_ends_leave_with_items_inside() {
    loom::model(|| {
        let (dropped, mut item) = counters();
        let (mut producer, mut consumer) = ring(2);
        assert!(producer.push(item()).is_ok());
        let sender = thread::spawn(move || {
            let _ = producer.push(item());
        });
        let receiver = thread::spawn(move || {
            let _ = consumer.pop();
        });
        sender.join().unwrap();
        receiver.join().unwrap();
        assert_eq!(dropped.load(Relaxed), 2);
    });
}

/// What the consumer did before it left is visible to a producer that has been told so. Invariant: `is_closed`
/// orders the two threads, so that the producer may take over what the consumer used.
#[test]
fn loom_ring_a_departure_is_seen_with_all_that_came_before_it() {
    loom::model(|| {
        let (producer, consumer) = ring::<()>(2);
        let used = super::sync::Arc::new(UnsafeCell::new(0));
        let by_receiver = used.clone();
        let receiver = thread::spawn(move || {
            // SAFETY: the producer's thread is at the cell only after it has seen the consumer gone.
            by_receiver.with_mut(|used| unsafe { *used = 7 });
            drop(consumer);
        });
        while !producer.is_closed() {
            yield_now();
        }
        // SAFETY: the consumer is gone, and its thread touches the cell only before that.
        assert_eq!(used.with(|used| unsafe { *used }), 7);
        receiver.join().unwrap();
    });
}
