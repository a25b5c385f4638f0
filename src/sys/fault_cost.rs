//! What tracking costs the one who writes: the time of a page's first write after its log was cleared.

use std::time::{Duration, Instant};

use super::TrackingError;
use super::guest_memory::GuestMemory;
use super::pagemap::{Pagemap, Scan};
use super::userfaultfd::Userfaultfd;
use crate::page::PAGE_SIZE;

/// Pages written in a pass.
const PAGES: u64 = 1024;

/// Passes; the fastest counts.
const PASSES: usize = 5;

/// Measures it on memory of this process, in a few milliseconds: a tracked write less one that is not.
pub fn measure() -> Result<Duration, TrackingError> {
    let no_memory = |error| TrackingError::Io("get memory to measure faults in", error);
    let memory = GuestMemory::create(PAGES).map_err(no_memory)?;
    memory.populate().map_err(no_memory)?;
    let uffd = Userfaultfd::open()?;
    uffd.register(memory.base(), memory.len())?;
    let own = Pagemap::of_self().map_err(|error| TrackingError::Io("open /proc/self/pagemap", error))?;
    let mut pagemap = Pagemap::new(own);
    let range = memory.base() as u64..memory.base() as u64 + memory.len() as u64;
    let (mut tracked, mut free) = (Duration::MAX, Duration::MAX);
    for _ in 0..PASSES {
        pagemap.scan(Scan::GetAndClear, range.start, range.end, &mut |_, _| {})?;
        tracked = tracked.min(write_all(&memory));
        free = free.min(write_all(&memory));
    }
    Ok(tracked.saturating_sub(free) / PAGES as u32)
}

fn write_all(memory: &GuestMemory) -> Duration {
    let Some(mut writer) = memory.writer() else { return Duration::ZERO };
    let bytes = writer.bytes();
    let begun = Instant::now();
    for byte in bytes.iter_mut().step_by(PAGE_SIZE) {
        *byte = std::hint::black_box(*byte).wrapping_add(1);
    }
    begun.elapsed()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_fault_takes_some_time() {
        match super::measure() {
            Ok(cost) => assert!(!cost.is_zero()),
            Err(error) => println!("skipped: {error}"),
        }
    }
}
