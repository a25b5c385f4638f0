//! What the stages tell each other beside the rings: counters, a snapshot for the display, and the word to stop.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::Thread;
use std::time::Duration;

use crossbeam::utils::CachePadded;

use super::sync::{AtomicBool, Ordering, yield_now};

/// What a lane has put on the wire so far. Written by its sender (`absent`: by its mapper), read by everybody.
#[derive(Default)]
pub struct LaneProgress {
    /// Pages named in records sent.
    pub entries: AtomicU64,
    /// Pages sent with their data.
    pub data_pages: AtomicU64,
    /// Bytes sent, headers included.
    pub bytes: AtomicU64,
    /// Pages handed out that were not there.
    pub absent: AtomicU64,
    all_sent: AtomicBool,
}

impl LaneProgress {
    /// Notes that the lane's last byte is on the socket or in the pipe. Zero-copy sends may still refer to slots and guest
    /// memory.
    pub fn note_all_sent(&self) {
        self.all_sent.store(true, Ordering::Release);
    }

    /// Notes what was sent. Whoever sees the entries sees the rest.
    pub fn note_sent(&self, entries: u64, data_pages: u64, bytes: u64) {
        self.data_pages.fetch_add(data_pages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.fetch_add(entries, Ordering::Release);
    }
}

/// What the scanner knew at its last sample. Written by the scanner, read by control for the display.
#[derive(Default)]
pub struct ScannerStatus {
    /// Pages pending.
    pub pending: AtomicU64,
    /// Pages that the forecast holds back.
    pub deferred: AtomicU64,
    /// Pages dirty in a second.
    pub dirty_pages_per_s: AtomicU64,
    /// What stopping now would cost the guest, in microseconds.
    pub forecast_downtime_us: AtomicU64,
}

/// Shared by all threads of one migration.
pub struct Shared {
    /// One for each lane.
    pub lanes: Vec<CachePadded<LaneProgress>>,
    /// The scanner's last word.
    pub status: CachePadded<ScannerStatus>,
    abort: AtomicBool,
    quiet: AtomicBool,
    control: Thread,
    spin: bool,
}

impl Shared {
    /// For `lanes` lanes, made by the control thread; `spin`: idle stages burn their cores instead of sleeping.
    pub fn new(lanes: usize, spin: bool) -> Self {
        Shared {
            lanes: (0..lanes).map(|_| CachePadded::default()).collect(),
            status: CachePadded::default(),
            abort: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
            control: std::thread::current(),
            spin,
        }
    }

    /// Tells every stage to stop where it is.
    pub fn abort(&self) {
        self.abort.store(true, Ordering::Release);
    }

    /// Whether the stages are to stop.
    pub fn is_aborted(&self) -> bool {
        self.abort.load(Ordering::Acquire)
    }

    /// Pages named in records sent, over all lanes.
    pub fn entries_sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.entries.load(Ordering::Acquire)).sum()
    }

    /// Pages handed out that were not there, over all lanes.
    pub fn absent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.absent.load(Ordering::Relaxed)).sum()
    }

    /// Pages sent with data, over all lanes.
    pub fn data_pages_sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.data_pages.load(Ordering::Relaxed)).sum()
    }

    /// Has stages that find nothing to do sleep longer, because the guest is being suspended and nothing new comes meanwhile.
    /// Where dom0 has one core, whoever suspends the guest needs it.
    pub fn begin_quiet(&self) {
        self.quiet.store(true, Ordering::Release);
    }

    /// Whether they do now.
    pub fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Acquire)
    }

    /// Whether idle stages burn their cores.
    pub fn spins(&self) -> bool {
        self.spin
    }

    /// Ends that, and wakes `stages`.
    pub fn end_quiet(&self, stages: &[Thread]) {
        // Before the waking: a stage that still sees the old word finds its wake-up when it goes to sleep.
        self.quiet.store(false, Ordering::Release);
        stages.iter().for_each(Thread::unpark);
    }

    /// Notes that a lane's last byte is on its way, and wakes control.
    pub fn note_all_sent(&self, lane: usize) {
        self.lanes[lane].note_all_sent();
        self.control.unpark();
    }

    /// Whether every lane's last byte is on its socket: what is written there now comes after it.
    pub fn all_sent(&self) -> bool {
        self.lanes.iter().all(|lane| lane.all_sent.load(Ordering::Acquire))
    }

    /// Bytes sent, over all lanes.
    pub fn bytes_sent(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.bytes.load(Ordering::Relaxed)).sum()
    }

    /// A stage's way of waiting.
    pub fn idle(self: &Arc<Self>) -> Idle {
        Idle { shared: self.clone(), nap: Idle::SHORTEST, slept: Duration::ZERO, pace: Duration::ZERO }
    }
}

/// What a stage's step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something was done; there may be more to do.
    Worked,
    /// There is nothing to do now. It is to be looked at again, soon, and after this time at the latest.
    Wait(Duration),
    /// There is nothing to do for this time.
    Rest(Duration),
    /// The stage is at its end.
    Done,
}

/// How a stage waits for work: in naps that grow from 40 microseconds to half a millisecond, so that a busy
/// pipeline reacts at once and a throttled one hardly uses its cores. The longest is far less than the rings and
/// slots hold: at 2.5 GB/s the 16 slots of a lane are 1.7 ms of work.
///
/// Behind a slow link work comes every few milliseconds, and the naps grow to a quarter of that. (In the Xen lab, where a
/// nap costs some 100 microseconds of CPU, longer naps and fewer samples together took the save helper from 28 to 11 CPU
/// seconds a migration.)
///
/// While the guest is being suspended ([`Shared::begin_quiet`]) they are longer still, and end when there is work again.
pub struct Idle {
    shared: Arc<Shared>,
    nap: Duration,
    /// Slept since there was work.
    slept: Duration,
    /// How long there was usually nothing to do between work and work.
    pace: Duration,
}

impl Idle {
    const SHORTEST: Duration = Duration::from_micros(40);
    const LONGEST: Duration = Duration::from_micros(500);
    const LONGEST_WHEN_SLOW: Duration = Duration::from_millis(4);
    const WHEN_QUIET: Duration = Duration::from_millis(4);

    /// Waits as long as is right after a step.
    pub fn follow(&mut self, step: Step) {
        match step {
            Step::Worked => self.worked(),
            Step::Wait(most) => self.wait(most),
            Step::Rest(nap) => self.sleep(nap),
            Step::Done => {}
        }
    }

    /// There was work. The next nap is half as long, not the shortest: work that comes at a steady, slow pace is then
    /// met by naps of about its period, instead of a whole ladder of naps for each piece.
    pub fn worked(&mut self) {
        self.nap = (self.nap / 2).max(Self::SHORTEST);
        self.pace = (self.pace + self.slept) / 2;
        self.slept = Duration::ZERO;
    }

    /// There was none: waits a little, `most` at most.
    pub fn wait(&mut self, most: Duration) {
        if !cfg!(loom) && !self.shared.spin && self.shared.is_quiet() {
            std::thread::park_timeout(Self::WHEN_QUIET.min(most));
            self.nap = Self::SHORTEST;
            return;
        }
        let nap = self.nap().min(most);
        self.sleep(nap);
    }

    /// Sleeps for `nap`, or for a moment if the stage must not sleep.
    pub fn sleep(&self, nap: Duration) {
        if cfg!(loom) {
            yield_now();
        } else if self.shared.spin {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(nap);
        }
    }

    /// The length of the next nap, for a stage that can do something useful while it waits; zero if it must not sleep.
    pub fn nap(&mut self) -> Duration {
        let nap = self.nap;
        self.slept = self.slept.saturating_add(nap);
        let longest = (self.pace / 4).clamp(Self::LONGEST, Self::LONGEST_WHEN_SLOW);
        self.nap = (nap * 2).min(longest);
        if self.shared.spin { Duration::ZERO } else { nap }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// The longest nap of a stage that gets work whenever it has slept for `gap`, after a while.
    fn longest_nap(gap: Duration) -> Duration {
        let mut idle = Arc::new(Shared::new(1, false)).idle();
        let mut longest = Duration::ZERO;
        for _ in 0..50 {
            longest = Duration::ZERO;
            let mut slept = Duration::ZERO;
            while slept < gap {
                let nap = idle.nap();
                slept += nap;
                longest = longest.max(nap);
            }
            idle.worked();
        }
        longest
    }

    /// Whoever was woken before it goes to sleep does not sleep.
    fn assert_was_woken() {
        let (since, patience) = (std::time::Instant::now(), Duration::from_secs(60));
        std::thread::park_timeout(patience);
        assert!(since.elapsed() < patience, "nobody woke this thread");
    }

    #[test]
    fn a_stage_that_was_left_in_peace_is_quick_again_afterwards() {
        let shared = Arc::new(Shared::new(1, false));
        let mut idle = shared.idle();
        assert!((0..10).any(|_| idle.nap() > Idle::SHORTEST));
        shared.begin_quiet();
        idle.wait(Duration::MAX);
        assert_eq!(idle.nap(), Idle::SHORTEST);
        shared.end_quiet(&[std::thread::current()]);
        assert_was_woken();
    }

    #[test]
    fn naps_are_short_behind_a_fast_link_and_a_part_of_the_wait_behind_a_slow_one() {
        assert!(longest_nap(Duration::from_micros(100)) <= Duration::from_micros(200));
        assert_eq!(longest_nap(Duration::from_millis(1)), Idle::LONGEST);
        let slow = longest_nap(Duration::from_millis(10));
        assert!(slow > Duration::from_millis(2) && slow < Duration::from_millis(4), "{slow:?}");
        assert_eq!(longest_nap(Duration::from_secs(1)), Idle::LONGEST_WHEN_SLOW);
    }
}
