//! The sender of a lane that goes into a pipe or a file: vectored writes from slots.
//!
//! The kernel copies what is written, so a slot is free as soon as the write that covered it is done.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::FilledSlot;
use super::latency::{Latencies, Stage};
use super::ring::{Consumer, PopError, Producer};
use super::sender::{SendError, SenderReport};
use super::shared::Shared;
use super::slots::{Slot, SlotPool, give_back};
use crate::sys::cpu;
use crate::transport::pacer::Pacer;
use crate::transport::stream_out::StreamOut;

/// The most slots in one write.
const SLOTS_AT_ONCE: usize = 8;

/// How long one wait may last before the abort flag is looked at.
const PATIENCE: Duration = Duration::from_millis(50);

/// What to write to and from.
pub struct WriterSetup {
    /// The pipe or file.
    pub stream: Arc<StreamOut>,
    /// The lane's number.
    pub lane: usize,
    /// The slots; held for as long as there are any.
    pub pool: SlotPool,
    /// The lane's share of the bandwidth cap, in bytes per second.
    pub bytes_per_s: Option<u64>,
}

/// A writer's state.
pub struct Writer {
    setup: WriterSetup,
    filled: Consumer<FilledSlot>,
    free: Producer<Slot>,
    shared: Arc<Shared>,
    pacer: Pacer,
    started: Instant,
    report: SenderReport,
}

impl Writer {
    /// A writer for one lane.
    pub fn new(
        setup: WriterSetup,
        filled: Consumer<FilledSlot>,
        free: Producer<Slot>,
        shared: Arc<Shared>,
    ) -> Self {
        let pacer = Pacer::new(setup.bytes_per_s);
        Writer {
            setup,
            filled,
            free,
            shared,
            pacer,
            started: Instant::now(),
            report: SenderReport { latencies: Latencies::of(&[Stage::Send]), ..SenderReport::default() },
        }
    }

    /// Runs until the mapper is done and everything is written, or until the stream breaks.
    pub fn run(mut self) -> Result<SenderReport, SendError> {
        let result = self.write_all();
        if result.is_err() {
            self.shared.abort();
        }
        self.report.cpu = cpu::thread_cpu_time();
        result.map(|()| self.report)
    }

    fn write_all(&mut self) -> Result<(), SendError> {
        let mut idle = self.shared.idle();
        let mut slots = Vec::with_capacity(SLOTS_AT_ONCE);
        loop {
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
            match self.filled.pop() {
                Ok(first) => {
                    idle.worked();
                    slots.push(first);
                    self.write(&mut slots)?;
                }
                Err(PopError::Empty) => idle.wait(Duration::MAX),
                Err(PopError::Closed) => {
                    self.shared.note_all_sent(self.setup.lane);
                    return Ok(());
                }
            }
        }
    }

    /// Writes the slot in `slots` and what else is there and due, and gives them all back.
    fn write(&mut self, slots: &mut Vec<FilledSlot>) -> Result<(), SendError> {
        self.wait_for_turn()?;
        let mut bytes = 0;
        loop {
            let slot_bytes = slots[slots.len() - 1].bytes().len();
            self.pacer.sent(self.pacer.since(self.started), slot_bytes as u64);
            bytes += slot_bytes;
            if slots.len() == SLOTS_AT_ONCE || !self.pacer.delay(self.pacer.since(self.started)).is_zero() {
                break;
            }
            match self.filled.pop() {
                Ok(next) => slots.push(next),
                Err(_) => break,
            }
        }
        self.write_out(slots, bytes)
    }

    fn write_out(&mut self, slots: &mut Vec<FilledSlot>, bytes: usize) -> Result<(), SendError> {
        let mut parts = [IoSlice::new(&[]); SLOTS_AT_ONCE];
        for (part, slot) in parts.iter_mut().zip(&*slots) {
            *part = IoSlice::new(slot.bytes());
        }
        let mut rest = &mut parts[..slots.len()];
        let begun = Instant::now();
        while !rest.is_empty() {
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
            self.report.enters += 1;
            let wrote = self.setup.stream.write_some(rest, PATIENCE).map_err(SendError::Connection)?;
            IoSlice::advance_slices(&mut rest, wrote);
        }
        self.report.latencies.note(Stage::Send, begun.elapsed(), slots.len() as u64);
        let (mut entries, mut data_pages) = (0, 0);
        for slot in slots.drain(..) {
            entries += u64::from(slot.payload().entries);
            data_pages += u64::from(slot.payload().data_pages);
            give_back(&mut self.free, slot);
        }
        self.report.bytes.plain_bytes += bytes as u64;
        self.shared.lanes[self.setup.lane].note_sent(entries, data_pages, bytes as u64);
        Ok(())
    }

    fn wait_for_turn(&mut self) -> Result<(), SendError> {
        loop {
            let delay = self.pacer.delay(self.pacer.since(self.started));
            if delay.is_zero() {
                return Ok(());
            }
            std::thread::sleep(delay.min(PATIENCE));
            if self.shared.is_aborted() {
                return Err(SendError::Aborted);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::page::PAGE_SIZE;
    use crate::pipeline::batch::{RecordInfo, Runs};
    use crate::pipeline::ring::ring;
    use crate::sys::slot_memory::SlotMemory;

    /// A slot of `byte`s to be written.
    fn filled(mut slot: Slot, byte: u8) -> FilledSlot {
        slot.bytes_mut().fill(byte);
        let size = slot.size();
        let info = RecordInfo { entries: 1, data_pages: 1, external: Runs::new() };
        FilledSlot::new(slot, 0..size, info).ok().expect("the whole slot")
    }

    #[test]
    fn several_slots_go_in_one_write_in_order_and_come_back() {
        let (pool, slots) = SlotPool::new(SlotMemory::new(20 * PAGE_SIZE).unwrap(), PAGE_SIZE).unwrap();
        let (mut reader, into) = std::io::pipe().unwrap();
        let stream = Arc::new(StreamOut::new(into.into()).unwrap());
        let (mut to_writer, filled_out) = ring(32);
        let (free_in, mut free) = ring(32);
        let shared = Arc::new(Shared::new(1, false));
        let setup = WriterSetup { stream, lane: 0, pool, bytes_per_s: None };
        let writer = Writer::new(setup, filled_out, free_in, shared.clone());
        for (byte, slot) in slots.into_iter().enumerate() {
            assert!(to_writer.push(filled(slot, byte as u8)).is_ok());
        }
        let thread = std::thread::spawn(move || writer.run());
        while shared.entries_sent() < 20 {
            std::thread::yield_now();
        }
        let mut all = vec![0; 20 * PAGE_SIZE];
        reader.read_exact(&mut all).unwrap();
        assert!(all.chunks(PAGE_SIZE).enumerate().all(|(byte, page)| page.iter().all(|b| *b == byte as u8)));
        drop(to_writer);
        let report = thread.join().unwrap().unwrap();
        assert_eq!(report.bytes.plain_bytes, 20 * PAGE_SIZE as u64);
        assert!(report.enters <= 20, "several slots in a write");
        let timed: Vec<_> = report.latencies.seen().map(|(stage, times)| (stage, times.len())).collect();
        assert_eq!(timed, [(Stage::Send, 20)], "a time for each slot");
        assert_eq!(std::iter::from_fn(|| free.pop().ok()).count(), 20);
    }
}
