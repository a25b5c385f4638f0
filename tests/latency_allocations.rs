//! What a stage notes of its times allocates nothing: the histograms have all of their memory from the start.

use pagecast::pipeline::latency::{Latencies, Stage};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The system's allocator, counting what is asked of it.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above, and `block` came from the system's allocator.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn no_time_that_is_noted_allocates() {
    let mut latencies = Latencies::of(&Stage::ALL);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for power in 0..64 {
        for stage in Stage::ALL {
            latencies.note(stage, Duration::from_nanos(1 << power), 4);
        }
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    assert_eq!(latencies.seen().count(), Stage::ALL.len(), "it was at work");
}
