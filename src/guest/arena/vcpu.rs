//! The one thread that runs an arena guest: the only one that writes its RAM.
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

enum Request {
    Suspend(Reply<()>),
    Resume(Reply<()>),
    Stats(Reply<(Stats, bool)>),
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
                        Processor { machine, inbox, interrupt: seen, running }.run();
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

    /// Lets the guest run.
    pub fn resume(&self) -> Result<(), Stopped> {
        self.ask(Request::Resume)
    }

    /// The guest's counters, and whether it is running.
    pub fn stats(&self) -> Result<(Stats, bool), Stopped> {
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

struct Processor<'a> {
    machine: Machine<'a>,
    inbox: Receiver<Request>,
    interrupt: Arc<AtomicBool>,
    running: bool,
}

impl Processor<'_> {
    fn run(mut self) {
        let mut last = Instant::now();
        loop {
            if self.running {
                let now = Instant::now();
                let interrupt = &self.interrupt;
                let nap = self
                    .machine
                    .advance(now - last, &mut || !interrupt.load(Ordering::Acquire))
                    .next_due_in
                    .min(LONGEST_NAP);
                last = now;
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
            Request::Stats(reply) => drop(reply.send((self.machine.stats(), self.running))),
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
