//! The one thread that runs an arena guest: the only one that writes its RAM.
//!
//! It can be slowed down: then it runs in short turns, and after each stands still for as much longer as the throttle says,
//! waiting for requests.
//!
//! It is steered by requests; an interrupt flag makes it look at them after the operation it is in, so that a
//! suspend takes one page write and not a time slice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{CheckReport, Machine, MachineError, Spec, Stats};
use crate::sys::guest_memory::GuestMemory;

/// The longest sleep between two looks at the clock.
const LONGEST_NAP: Duration = Duration::from_millis(20);

/// A turn of a guest that is slowed down, standing still included: a thirtieth of a downtime budget of 300 ms, so that no
/// sample of the dirty log sees one part of it alone.
const THROTTLE_PERIOD: Duration = Duration::from_millis(10);

/// The longest that it stands still after a turn, whatever kept it from its turn's end.
const LONGEST_STAND: Duration = Duration::from_millis(20);

/// A guest cannot be slowed down by more.
pub const MOST_THROTTLE_PERCENT: u8 = 95;

enum Request {
    Suspend(Reply<()>),
    Throttle(u8, Reply<()>),
    Resume(Reply<()>),
    Stats(Reply<(Stats, bool, u8)>),
    Check(Reply<Option<CheckReport>>),
    Quit,
}

type Reply<T> = std::sync::mpsc::SyncSender<T>;

/// How the guest comes to life.
pub enum Start {
    /// With a fresh memory, written according to the specification.
    Boot(Spec),
    /// With a memory that holds a guest, which stays suspended until it is resumed.
    Adopt,
}

/// A handle to the running thread.
pub struct Vcpu {
    spec: Spec,
    requests: Sender<Request>,
    interrupt: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The thread has ended although nobody asked it to.
#[derive(Debug, thiserror::Error)]
#[error("the guest's processor has stopped")]
pub struct Stopped;

impl Vcpu {
    /// Starts the thread and waits until the guest is booted or adopted.
    pub fn start(memory: Arc<GuestMemory>, start: Start) -> Result<Self, MachineError> {
        let (requests, inbox) = channel();
        let interrupt = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = sync_channel(1);
        let seen = interrupt.clone();
        let thread = std::thread::Builder::new()
            .name("guest-vcpu".to_owned())
            .spawn(move || {
                let mut writer = memory.writer().expect("a guest's process writes its memory in one place");
                let ram = writer.bytes();
                let (machine, running) = match start {
                    Start::Boot(spec) => (Machine::boot(ram, &spec), true),
                    Start::Adopt => (Machine::resume(ram), false),
                };
                match machine {
                    Ok(machine) => {
                        let _ = ready.send(Ok(machine.spec().clone()));
                        let throttle = Throttle::new(Instant::now());
                        Processor { machine, inbox, interrupt: seen, running, throttle }.run();
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            })
            .expect("a process that just started can start a thread");
        let spec = is_ready.recv().expect("the thread answers before it ends")?;
        Ok(Vcpu { spec, requests, interrupt, thread: Some(thread) })
    }

    /// What the guest is.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Stopped> {
        let (reply, answer) = sync_channel(1);
        self.requests.send(request(reply)).map_err(|_| Stopped)?;
        self.interrupt.store(true, Ordering::Release);
        answer.recv().map_err(|_| Stopped)
    }

    /// Stops the guest; returns when its last write is done.
    pub fn suspend(&self) -> Result<(), Stopped> {
        self.ask(Request::Suspend)
    }

    /// Has the guest stand still for `percent` of its time, [`MOST_THROTTLE_PERCENT`] at most; 0: runs it at full speed.
    pub fn throttle(&self, percent: u8) -> Result<(), Stopped> {
        self.ask(|reply| Request::Throttle(percent.min(MOST_THROTTLE_PERCENT), reply))
    }

    /// Lets the guest run.
    pub fn resume(&self) -> Result<(), Stopped> {
        self.ask(Request::Resume)
    }

    /// The guest's counters, whether it is running, and by how much it is slowed down, in percent.
    pub fn stats(&self) -> Result<(Stats, bool, u8), Stopped> {
        self.ask(Request::Stats)
    }

    /// Checks every page; None while suspended, since the counters of a check would change the memory.
    pub fn check(&self) -> Result<Option<CheckReport>, Stopped> {
        self.ask(Request::Check)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.requests.send(Request::Quit);
        self.interrupt.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Turns of running and of standing still.
struct Throttle {
    percent: u8,
    turn_began: Instant,
    stands_until: Option<Instant>,
}

impl Throttle {
    fn new(now: Instant) -> Self {
        Throttle { percent: 0, turn_began: now, stands_until: None }
    }

    fn set(&mut self, percent: u8) {
        *self = Throttle { percent, ..Throttle::new(Instant::now()) };
    }

    /// How long the guest still has to stand still; zero if it may run.
    fn stands_for(&mut self, now: Instant) -> Duration {
        let Some(until) = self.stands_until else { return Duration::ZERO };
        let left = until.saturating_duration_since(now);
        if left.is_zero() {
            (self.stands_until, self.turn_began) = (None, now);
        }
        left
    }

    /// The rest of the turn; at its end the guest is to stand still. It stands still for as long as it really ran, times
    /// what the throttle says, so that a turn that came out longer does not weaken the throttle.
    fn turn_left(&mut self, now: Instant) -> Duration {
        if self.percent == 0 {
            return Duration::MAX;
        }
        let (still, running) = (u32::from(self.percent), u32::from(100 - self.percent));
        let ran = now.saturating_duration_since(self.turn_began);
        let left = (THROTTLE_PERIOD * running / 100).saturating_sub(ran);
        if left.is_zero() {
            self.stands_until = Some(now + (ran * still / running).min(LONGEST_STAND));
        }
        left
    }
}

struct Processor<'a> {
    machine: Machine<'a>,
    inbox: Receiver<Request>,
    interrupt: Arc<AtomicBool>,
    running: bool,
    throttle: Throttle,
}

impl Processor<'_> {
    fn run(mut self) {
        let mut last = Instant::now();
        // Whether the guest has been standing still, because it is slowed down, since `last`.
        let mut standing = false;
        loop {
            if self.running {
                let now = Instant::now();
                let interrupt = &self.interrupt;
                let mut ran = now - last;
                last = now;
                if standing {
                    self.machine.stand_still(ran);
                    ran = Duration::ZERO;
                }
                let stands_for = self.throttle.stands_for(now);
                standing = !stands_for.is_zero();
                let advance =
                    self.machine.advance(ran, &mut || !standing && !interrupt.load(Ordering::Acquire));
                let nap = if standing {
                    stands_for
                } else {
                    advance.next_due_in.min(LONGEST_NAP).min(self.throttle.turn_left(Instant::now()))
                };
                if !self.interrupt.load(Ordering::Acquire) {
                    if nap.is_zero() {
                        continue;
                    }
                    match self.inbox.recv_timeout(nap) {
                        Ok(request) => {
                            if !self.serve(request, &mut last) {
                                return;
                            }
                        }
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                    continue;
                }
            } else {
                match self.inbox.recv() {
                    Ok(request) => {
                        if !self.serve(request, &mut last) {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
            self.interrupt.store(false, Ordering::Release);
            while let Ok(request) = self.inbox.try_recv() {
                if !self.serve(request, &mut last) {
                    return;
                }
            }
        }
    }

    /// Serves one request; false when the thread is to end. A requester that has gone wants no answer.
    fn serve(&mut self, request: Request, last: &mut Instant) -> bool {
        match request {
            Request::Suspend(reply) => {
                self.running = false;
                let _ = reply.send(());
            }
            Request::Resume(reply) => {
                if !self.running {
                    self.running = true;
                    *last = Instant::now();
                }
                let _ = reply.send(());
            }
            Request::Throttle(percent, reply) => {
                self.throttle.set(percent);
                let _ = reply.send(());
            }
            Request::Stats(reply) => {
                drop(reply.send((self.machine.stats(), self.running, self.throttle.percent)));
            }
            Request::Check(reply) => {
                let report = self.running.then(|| self.machine.check_all(&mut || true));
                *last = Instant::now();
                let _ = reply.send(report);
            }
            Request::Quit => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of a hundred periods in which a guest that never sleeps runs, in slices of so long.
    fn share_running(percent: u8, slice: Duration) -> f64 {
        let begin = Instant::now();
        let mut throttle = Throttle { percent, ..Throttle::new(begin) };
        let (mut now, mut ran) = (begin, Duration::ZERO);
        while now < begin + 100 * THROTTLE_PERIOD {
            let stands_for = throttle.stands_for(now);
            if stands_for.is_zero() {
                now += slice;
                ran += slice;
                throttle.turn_left(now);
            } else {
                now += stands_for;
            }
        }
        ran.as_secs_f64() / (now - begin).as_secs_f64()
    }

    #[test]
    fn a_throttle_leaves_the_share_of_time_that_it_says() {
        for percent in [0, 20, 50, 80, 95] {
            for slice_us in [10, 200, 900] {
                let share = share_running(percent, Duration::from_micros(slice_us));
                let meant = f64::from(100 - percent) / 100.0;
                assert!((share - meant).abs() < 0.02, "{percent} %, slices of {slice_us} us: {share}");
            }
        }
    }

    #[test]
    fn a_guest_never_stands_still_for_longer_than_the_limit() {
        let begin = Instant::now();
        let mut throttle = Throttle { percent: 95, ..Throttle::new(begin) };
        throttle.turn_left(begin + Duration::from_secs(1));
        assert_eq!(throttle.stands_for(begin + Duration::from_secs(1)), LONGEST_STAND);
    }

    #[test]
    fn a_guest_that_stands_still_under_a_throttle_is_suspended_and_released_at_once() {
        let memory = Arc::new(GuestMemory::create(1024).expect("4 MiB of memory"));
        let spec = Spec::new(super::super::Workload::Storm, 1);
        let vcpu = Vcpu::start(memory, Start::Boot(spec)).expect("a guest");
        vcpu.throttle(100).expect("it runs");
        assert_eq!(vcpu.stats().expect("it runs").2, MOST_THROTTLE_PERCENT);
        for _ in 0..50 {
            vcpu.suspend().expect("it runs");
            let (before, running, _) = vcpu.stats().expect("it answers");
            assert!(!running);
            assert_eq!(vcpu.stats().expect("it answers").0, before, "nothing changes any more");
            vcpu.resume().expect("it answers");
        }
        vcpu.throttle(0).expect("it runs");
        let (stats, running, percent) = vcpu.stats().expect("it runs");
        assert_eq!((running, percent, stats.errors), (true, 0, 0));
        let report = vcpu.check().expect("it runs").expect("it is not suspended");
        assert_eq!(report.errors, 0);
    }
}
