//! The bounded queue between two stages of the pipeline: one thread pushes, one thread pops, nobody waits.
//!
//! What always holds, and what `loom_ring.rs` checks:
//!
//! * An item comes out once, in the order in which it went in; an item that does not come out is dropped once.
//! * The producer writes only cells outside `head..tail`, the consumer reads only cells inside it, and each moves
//!   its own end past a cell only when it is done with it.
//! * Either end learns that the other is gone; the consumer only after it has had everything.
//!
//! Ours, because loom cannot see into crossbeam's queues. The shape follows `rtrb`.

use std::cell::Cell;
use std::mem::MaybeUninit;

use crossbeam::utils::CachePadded;

use super::sync::{Arc, AtomicBool, AtomicUsize, Ordering, UnsafeCell};

/// A ring that holds up to `capacity` items.
///
/// # Panics
///
/// If `capacity` is not a power of two.
pub fn ring<T>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    ring_from(capacity, 0)
}

/// A ring whose indices begin at `start`, so that tests can see them pass `usize::MAX`.
pub(super) fn ring_from<T>(capacity: usize, start: usize) -> (Producer<T>, Consumer<T>) {
    assert!(capacity.is_power_of_two(), "a ring's capacity must be a power of two, not {capacity}");
    let shared = Arc::new(Shared {
        head: CachePadded::new(AtomicUsize::new(start)),
        tail: CachePadded::new(AtomicUsize::new(start)),
        producer_gone: AtomicBool::new(false),
        consumer_gone: AtomicBool::new(false),
        cells: (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
    });
    (
        Producer { shared: shared.clone(), tail: start, cached_head: Cell::new(start) },
        Consumer { shared, head: start, cached_tail: Cell::new(start) },
    )
}

/// The cells `head..tail` hold an item each, the others nothing. Both indices count up for ever and wrap around at
/// `usize::MAX`, which the capacity, a power of two, divides; so `tail - head`, wrapping, is the number of items
/// and never more than the capacity.
struct Shared<T> {
    /// Index of the oldest item. Written by the consumer alone.
    head: CachePadded<AtomicUsize>,
    /// Index one past the newest item. Written by the producer alone.
    tail: CachePadded<AtomicUsize>,
    /// Written once, so these two can share a cache line with what is never written.
    producer_gone: AtomicBool,
    consumer_gone: AtomicBool,
    cells: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: the threads share the indices and flags, which are atomics, and the cells, of which each is the producer's
// or the consumer's alone at any time (see above); an item moves from one thread to the other, hence `T: Send`.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn cell(&self, index: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.cells[index & (self.cells.len() - 1)]
    }

    /// Puts `value` into the cell at `index`.
    ///
    /// # Safety
    ///
    /// The cell is outside `head..tail`, and the caller is the producer and has seen the consumer leave it.
    unsafe fn write(&self, index: usize, value: T) {
        self.cell(index).with_mut(|cell| {
            // SAFETY: by this function's contract nobody else is at the cell.
            unsafe { (*cell).write(value) };
        });
    }

    /// Takes the value out of the cell at `index`.
    ///
    /// # Safety
    ///
    /// The cell is inside `head..tail`, the caller is the consumer and has seen the producer's write to it, and
    /// the cell is not read again before it has been written again.
    unsafe fn take(&self, index: usize) -> T {
        self.cell(index).with_mut(|cell| {
            // SAFETY: by this function's contract the cell holds a value, nobody else is at it, and nobody will
            // take the value a second time.
            unsafe { (*cell).assume_init_read() }
        })
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let tail = self.tail.load(Ordering::Relaxed);
        let mut head = self.head.load(Ordering::Relaxed);
        while head != tail {
            // SAFETY: both handles are gone, so this thread stands in for the consumer; the reference count that
            // went to zero has ordered all that they did before this; each index is passed once.
            drop(unsafe { self.take(head) });
            head = head.wrapping_add(1);
        }
    }
}

/// The end that pushes. There is one: it can go to another thread, but not be shared or cloned. Dropping it closes
/// the ring; the consumer still gets what is in it.
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    /// What `shared.tail` holds, known here without asking.
    tail: usize,
    /// What `shared.head` held when last looked at: its line need not be fetched for every push.
    cached_head: Cell<usize>,
}

/// Why an item could not be pushed. It is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushError<T> {
    /// The ring is full.
    Full(T),
    /// The consumer is gone, and so nobody would ever take the item.
    Closed(T),
}

/// The consumer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

impl<T> Producer<T> {
    /// Pushes one item.
    ///
    /// # Errors
    ///
    /// `Full` or `Closed`, with the item. An item pushed just before the consumer left is dropped with the ring.
    pub fn push(&mut self, value: T) -> Result<(), PushError<T>> {
        if self.is_closed() {
            return Err(PushError::Closed(value));
        }
        if self.free_at_least(1) == 0 {
            return Err(PushError::Full(value));
        }
        // SAFETY: the cell at `tail` is free: `free_at_least` has seen the consumer's index pass it.
        unsafe { self.shared.write(self.tail, value) };
        self.publish(self.tail.wrapping_add(1));
        Ok(())
    }

    /// Pushes items from `items` for as long as there are any and there is room, and shows them to the consumer
    /// all at once. Returns how many went in; takes none from `items` that does not go in.
    ///
    /// # Errors
    ///
    /// `Closed` if the consumer is gone; then nothing has been taken from `items`.
    pub fn push_batch(&mut self, items: &mut impl Iterator<Item = T>) -> Result<usize, Closed> {
        if self.is_closed() {
            return Err(Closed);
        }
        let free = self.free_at_least(self.capacity());
        let mut batch = Batch { written: 0, producer: self };
        while batch.written < free {
            let Some(item) = items.next() else { break };
            // SAFETY: `written < free`, so the cell is one of those that the consumer's index has been seen to
            // pass.
            unsafe { batch.producer.shared.write(batch.end(), item) };
            batch.written += 1;
        }
        Ok(batch.written)
    }

    /// How many items can be pushed now. More may fit later, never fewer.
    pub fn free(&self) -> usize {
        self.free_at_least(self.capacity())
    }

    /// Whether the consumer is gone. What it did before it left is then visible to this thread.
    pub fn is_closed(&self) -> bool {
        self.shared.consumer_gone.load(Ordering::Acquire)
    }

    /// How many items the ring holds when full.
    pub fn capacity(&self) -> usize {
        self.shared.cells.len()
    }

    /// How many items can be pushed: as far as known, or looked up if that is less than `wanted`.
    fn free_at_least(&self, wanted: usize) -> usize {
        let known = self.capacity() - self.tail.wrapping_sub(self.cached_head.get());
        if known >= wanted {
            return known;
        }
        // Acquire: with the index comes the end of the consumer's reading of the cells before it.
        self.cached_head.set(self.shared.head.load(Ordering::Acquire));
        self.capacity() - self.tail.wrapping_sub(self.cached_head.get())
    }

    fn publish(&mut self, tail: usize) {
        self.tail = tail;
        // Release: whoever sees the index sees what was written into the cells before it.
        self.shared.tail.store(tail, Ordering::Release);
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        // Release: whoever sees the flag sees the last index.
        self.shared.producer_gone.store(true, Ordering::Release);
    }
}

/// The part of a batch that has been written. Dropping it publishes it, also when the iterator panics: what has
/// gone into a cell is then still dropped by somebody.
struct Batch<'a, T> {
    producer: &'a mut Producer<T>,
    written: usize,
}

impl<T> Batch<'_, T> {
    fn end(&self) -> usize {
        self.producer.tail.wrapping_add(self.written)
    }
}

impl<T> Drop for Batch<'_, T> {
    fn drop(&mut self) {
        if self.written > 0 {
            self.producer.publish(self.end());
        }
    }
}

/// The end that pops. There is one: it can go to another thread, but not be shared or cloned. Dropping it closes
/// the ring; what is still in it is dropped when the producer is dropped too.
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    /// What `shared.head` holds, known here without asking.
    head: usize,
    /// What `shared.tail` held when last looked at; see the producer's `cached_head`.
    cached_tail: Cell<usize>,
}

/// Why nothing was popped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PopError {
    /// There is nothing now; there may be later.
    Empty,
    /// The producer is gone and everything that it pushed has been popped.
    Closed,
}

impl<T> Consumer<T> {
    /// Pops one item.
    ///
    /// # Errors
    ///
    /// `Empty`, or `Closed` once the ring is drained and the producer is gone.
    pub fn pop(&mut self) -> Result<T, PopError> {
        self.ready_at_least(1)?;
        // SAFETY: `ready_at_least` has seen the producer's index pass the cell at `head`, and the line below
        // takes the cell out of `head..tail`.
        let value = unsafe { self.shared.take(self.head) };
        self.publish(self.head.wrapping_add(1));
        Ok(value)
    }

    /// Pops up to `max` items onto the end of `out` and gives their cells back to the producer all at once.
    /// Returns how many, at least one unless `max` is 0. Allocates only if `out` lacks the room.
    ///
    /// # Errors
    ///
    /// `Empty`, or `Closed` once the ring is drained and the producer is gone; `out` is then as it was.
    pub fn pop_batch(&mut self, out: &mut Vec<T>, max: usize) -> Result<usize, PopError> {
        let count = self.ready_at_least(max.clamp(1, self.shared.cells.len()))?.min(max);
        // Before the first item leaves its cell: from there on nothing may panic.
        out.reserve(count);
        for at in 0..count {
            // SAFETY: `at` is below the count that `ready_at_least` has seen published, each cell is passed once,
            // and the line after the loop takes them all out of `head..tail`; nothing between can panic, as `out`
            // has the room.
            out.push(unsafe { self.shared.take(self.head.wrapping_add(at)) });
        }
        self.publish(self.head.wrapping_add(count));
        Ok(count)
    }

    /// How many items can be popped, at least one: as far as known, or looked up if that is less than `wanted`.
    fn ready_at_least(&self, wanted: usize) -> Result<usize, PopError> {
        let known = self.cached_tail.get().wrapping_sub(self.head);
        if known >= wanted {
            return Ok(known);
        }
        match self.look_up_ready() {
            0 if !self.shared.producer_gone.load(Ordering::Acquire) => Err(PopError::Empty),
            // The producer may have pushed between the look and its leaving; having seen it leave, the second
            // look is the last word.
            0 => match self.look_up_ready() {
                0 => Err(PopError::Closed),
                ready => Ok(ready),
            },
            ready => Ok(ready),
        }
    }

    fn look_up_ready(&self) -> usize {
        // Acquire: with the index comes what the producer wrote into the cells before it.
        self.cached_tail.set(self.shared.tail.load(Ordering::Acquire));
        self.cached_tail.get().wrapping_sub(self.head)
    }

    fn publish(&mut self, head: usize) {
        self.head = head;
        // Release: whoever sees the index knows that the cells before it have been read.
        self.shared.head.store(head, Ordering::Release);
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        // Release: whoever sees the flag sees what this thread did before it left.
        self.shared.consumer_gone.store(true, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::{rc::Rc, thread};

    use super::*;

    #[test]
    fn indices_pass_the_largest_number() {
        let (mut producer, mut consumer) = ring_from(4, usize::MAX - 1);
        let mut out = Vec::new();
        assert_eq!(producer.push_batch(&mut (0..9)), Ok(4));
        assert_eq!((producer.push(9), producer.free()), (Err(PushError::Full(9)), 0));
        assert_eq!((consumer.pop(), producer.free()), (Ok(0), 1));
        assert_eq!((consumer.pop_batch(&mut out, 2), consumer.pop_batch(&mut out, 2)), (Ok(2), Ok(1)));
        assert_eq!((out, consumer.pop()), (vec![1, 2, 3], Err(PopError::Empty)));
    }

    #[test]
    fn each_end_learns_that_the_other_is_gone() {
        let (mut producer, mut consumer) = ring(2);
        producer.push(1).unwrap();
        drop(producer);
        assert_eq!((consumer.pop(), consumer.pop()), (Ok(1), Err(PopError::Closed)));
        let (mut producer, consumer) = ring(2);
        drop(consumer);
        let mut items = 1..3;
        assert_eq!(producer.push(0), Err(PushError::Closed(0)));
        assert_eq!((producer.push_batch(&mut items), items), (Err(Closed), 1..3));
    }

    #[test]
    fn whatever_is_left_is_dropped_once_even_after_a_panic() {
        let item = Rc::new(());
        let (mut producer, mut consumer) = ring(8);
        let mut items = (0..4).map(|at| if at < 3 { item.clone() } else { panic!("no more") });
        catch_unwind(AssertUnwindSafe(|| producer.push_batch(&mut items))).unwrap_err();
        drop(consumer.pop().unwrap());
        assert_eq!(Rc::strong_count(&item), 3);
        drop((producer, consumer));
        assert_eq!(Rc::strong_count(&item), 1);
    }

    #[test]
    fn a_million_items_cross_in_order_in_batches_of_any_size() {
        const ITEMS: u64 = 1_000_000;
        let random = |state: &mut u64, below: u64| {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (*state >> 33) % below
        };
        let (mut producer, mut consumer) = ring(64);
        thread::scope(|scope| {
            scope.spawn(move || {
                let (mut next, mut state) = (0, 1);
                while next < ITEMS {
                    let end = ITEMS.min(next + random(&mut state, 100));
                    // Boxed, so that an item lost, taken twice or taken early does not go unnoticed.
                    next += producer.push_batch(&mut (next..end).map(Box::new)).unwrap() as u64;
                    if random(&mut state, 4) == 0 && producer.push(Box::new(next)).is_ok() {
                        next += 1;
                    }
                    thread::yield_now();
                }
            });
            let (mut seen, mut state, mut out) = (0, 2, Vec::with_capacity(100));
            while consumer.pop_batch(&mut out, random(&mut state, 100) as usize) != Err(PopError::Closed) {
                for item in out.drain(..) {
                    assert_eq!(*item, seen);
                    seen += 1;
                }
                thread::yield_now();
            }
            assert!(seen >= ITEMS);
        });
    }
}
