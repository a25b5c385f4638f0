//! Whole saves of a simulated domain, with a libxl that is two pipes and a receiver that is one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::*;
use crate::forecast::PolicyKind;
use crate::guest::xen::simulated::{DOMID, Guest, NEW, OLD, Simulated};
use crate::libxl::channel::Channel;
use crate::libxl::config::Options;
use crate::page::Pfn;
use crate::stream::image::PageState;
use crate::stream::{Image, Limits, page_digest};
use crate::sys::xen::abi::domctl::SHUTDOWN_SUSPEND;
use crate::sys::xen::tally::Call;

/// What libxl does when it is asked.
#[derive(Clone, Copy)]
struct Answers {
    switch: i32,
    suspend: i32,
    /// The guest really stops.
    stops: bool,
}

const WILLING: Answers = Answers { switch: 0, suspend: 1, stops: true };

/// What the receiver does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Receiver {
    ReadsAll,
    /// Reads so many bytes, and then no more; the pipe stays open.
    Stalls(usize),
    /// Reads so many bytes, and goes.
    Dies(usize),
}

/// A save, and all that takes part in it.
struct Attempt {
    result: Result<SaveReport, SaveError>,
    stream: Vec<u8>,
    /// What the domain held when it was suspended.
    at_suspend: Option<BTreeMap<u64, Vec<u8>>>,
    log: String,
    /// How often it was said that the domain is not left to the stock helper.
    ours: usize,
}

struct Setup {
    simulated: Arc<Simulated>,
    policy: PolicyKind,
    live: bool,
    answers: Answers,
    receiver: Receiver,
    /// Abort after so many bytes have been received.
    abort_after: Option<usize>,
    /// A report is configured.
    reports: bool,
}

impl Setup {
    fn new(simulated: &Arc<Simulated>) -> Self {
        Setup {
            simulated: simulated.clone(),
            policy: PolicyKind::Ar,
            live: true,
            answers: WILLING,
            receiver: Receiver::ReadsAll,
            abort_after: None,
            reports: true,
        }
    }

    /// Saves while `play` has the guest do something, again and again, until it is suspended.
    fn run(self, play: impl FnMut(&mut Guest) + Send + 'static) -> Attempt {
        let abort = Abort::new().unwrap();
        let (answers, to_answer) = rustix::pipe::pipe().unwrap();
        let (to_read, messages) = rustix::pipe::pipe().unwrap();
        let libxl = Libxl::new(Channel::over(answers, messages), &abort);
        let peer = start_libxl(self.simulated.clone(), self.answers, to_read.into(), to_answer.into());
        let (from, into) = rustix::pipe::pipe().unwrap();
        let receiver = start_receiver(from.into(), self.receiver, self.abort_after, abort.clone());
        let over = Arc::new(AtomicBool::new(false));
        let guest = start_guest(self.simulated.clone(), over.clone(), play);

        let mut options = Options::defaults(&[0]);
        options.report = self.reports.then(|| "/nowhere/report".parse().unwrap());
        options.settings.policy = self.policy;
        options.settings.max_time = Duration::from_secs(20);
        options.settings.sample_interval = Duration::from_millis(5);
        options.settings.bandwidth = Some(200_000_000);
        let request = SaveRequest { domid: DOMID, live: self.live, stream: into, options };
        let hypervisor: Arc<dyn Hypervisor> = self.simulated.clone();
        let ours = std::cell::Cell::new(0);
        let result = save_on(&hypervisor, &request, &libxl, &abort, &|| ours.set(ours.get() + 1));
        over.store(true, Ordering::Release);
        guest.join().unwrap();
        // As the save helper ends: a question that was cut short is answered first.
        libxl.complete(0, 0).unwrap();
        drop((request, libxl));
        let (at_suspend, log) = peer.join().unwrap();
        Attempt { result, stream: receiver.join().unwrap(), at_suspend, log, ours: ours.get() }
    }
}

/// What libxl has to tell: what the domain held when it was suspended, if it was, and the log.
type Told = (Option<BTreeMap<u64, Vec<u8>>>, String);

/// Reads messages and answers what wants an answer.
fn start_libxl(
    simulated: Arc<Simulated>,
    answers: Answers,
    mut messages: File,
    mut to_answer: File,
) -> JoinHandle<Told> {
    std::thread::spawn(move || {
        let (mut image, mut log) = (None, String::new());
        let mut len = [0; 2];
        while messages.read_exact(&mut len).is_ok() {
            let mut body = vec![0; u16::from_ne_bytes(len).into()];
            messages.read_exact(&mut body).unwrap();
            let answer = match u16::from_ne_bytes([body[0], body[1]]) {
                1 => {
                    log.push_str(&String::from_utf8_lossy(&body));
                    continue;
                }
                3 => {
                    let mut guest = simulated.guest();
                    if answers.stops {
                        guest.info.shutdown_reason = Some(SHUTDOWN_SUSPEND);
                    }
                    image = Some(guest.image());
                    answers.suspend
                }
                7 => answers.switch,
                10 => 0,
                _ => continue,
            };
            to_answer.write_all(&answer.to_ne_bytes()).unwrap();
        }
        (image, log)
    })
}

fn start_receiver(
    mut from: File,
    receiver: Receiver,
    abort_after: Option<usize>,
    abort: Abort,
) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut stream = Vec::new();
        let mut part = vec![0; 1 << 16];
        let most = match receiver {
            Receiver::ReadsAll => usize::MAX,
            Receiver::Stalls(bytes) | Receiver::Dies(bytes) => bytes,
        };
        while stream.len() < most {
            match from.read(&mut part).unwrap() {
                0 => return stream,
                read => stream.extend_from_slice(&part[..read]),
            }
            if abort_after.is_some_and(|bytes| stream.len() >= bytes) {
                abort.raise_for_test();
            }
        }
        if matches!(receiver, Receiver::Stalls(_)) {
            // Long enough for everything that could go on without it to come to a stand.
            std::thread::sleep(Duration::from_millis(300));
            abort.raise_for_test();
            while !abort_is_over(&from) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        stream
    })
}

/// Whether nobody holds the other end of a pipe any more.
fn abort_is_over(from: &File) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(from, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap();
    fds[0].revents().contains(PollFlags::HUP)
}

fn start_guest(
    simulated: Arc<Simulated>,
    over: Arc<AtomicBool>,
    mut play: impl FnMut(&mut Guest) + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while !over.load(Ordering::Acquire) {
            let mut guest = simulated.guest();
            if guest.info.shutdown_reason.is_none() {
                play(&mut guest);
            }
            drop(guest);
            std::thread::sleep(Duration::from_micros(200));
        }
    })
}

/// Writes to a few pages of the first `pages`, hot ones more often.
fn writer(pages: u64) -> impl FnMut(&mut Guest) + Send + 'static {
    let mut count = 0u64;
    move |guest| {
        for _ in 0..4 {
            count += 1;
            let mixed = count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            guest.write(if count.is_multiple_of(3) { mixed % pages } else { mixed % (pages / 20) }, count);
        }
    }
}

fn image(stream: &[u8]) -> Image {
    Image::read(stream, Limits::new(0xff000)).expect("a stream that the strict reader accepts")
}

/// Every page that the guest had when it stopped is in the stream as it was.
fn assert_whole(attempt: &Attempt) -> Image {
    let image = image(&attempt.stream);
    let at_suspend = attempt.at_suspend.as_ref().expect("it was suspended");
    for (gfn, page) in at_suspend {
        let digest = PageState::Data(page_digest(Pfn(*gfn), page));
        assert_eq!(image.pages.get(&Pfn(*gfn)), Some(&digest), "page {gfn:#x}");
    }
    image
}

/// After a failure the domain can be saved once more, and nothing was left behind.
fn assert_another_save_succeeds(simulated: &Arc<Simulated>) {
    assert!(!simulated.guest().is_logging(), "dirty logging is left on");
    simulated.guest().info.shutdown_reason = None;
    let attempt = Setup::new(simulated).run(writer(1000));
    attempt.result.as_ref().unwrap();
    assert_whole(&attempt);
    assert!(!simulated.guest().is_logging());
}

#[test]
fn a_live_save_brings_every_page_as_it_was_at_the_stop_under_every_policy() {
    for policy in PolicyKind::ALL {
        for version in [OLD, NEW] {
            let simulated = Simulated::pvh(version, 4000);
            let attempt = Setup { policy, ..Setup::new(&simulated) }.run(writer(4000));
            let report = attempt.result.as_ref().unwrap_or_else(|error| panic!("{policy}: {error}"));
            let image = assert_whole(&attempt);
            assert_eq!(image.tally.hole_entries, 0, "{policy}: holes are not sent");
            assert_eq!(image.tally.whole_chunks, 4000 / 512, "{policy}: each full chunk is named at once");
            assert_eq!((image.domain.xen_major, image.domain.xen_minor), (4, version.minor));
            assert_eq!(report.report["pages"], 4008, "{policy}");
            assert_eq!(attempt.ours, 1);
            assert!(!simulated.guest().is_logging());
        }
    }
}

#[test]
fn no_report_is_made_where_none_is_configured() {
    let simulated = Simulated::pvh(OLD, 300);
    let attempt = Setup { live: false, reports: false, ..Setup::new(&simulated) }.run(|_| {});
    assert_whole(&attempt);
    let made = attempt.result.as_ref().unwrap();
    assert!(made.report.is_null() && made.summary.contains("saved in"), "{made:?}");
}

#[test]
fn a_save_that_is_not_live_asks_for_no_dirty_log_and_brings_the_guest_as_it_was_suspended() {
    let simulated = Simulated::pvh(OLD, 3000);
    let mut next = 3500;
    let attempt = Setup { live: false, ..Setup::new(&simulated) }.run(move |guest| {
        // It balloons up to the last moment.
        guest.write(next % 3000, next);
        if next < 4000 {
            guest.add(next + 100);
            next += 1;
        }
    });
    let report = attempt.result.as_ref().unwrap();
    assert_whole(&attempt);
    let calls = &report.report["xen"]["calls"];
    assert_eq!((&calls["log_dirty_enable"], &calls["log_dirty_clean"]), (&0.into(), &0.into()));
    assert_eq!(report.report["stop_reason"], "the guest was suspended from the start");
}

#[test]
fn a_guest_that_balloons_while_it_is_saved_loses_nothing() {
    for version in [OLD, NEW] {
        let simulated = Simulated::pvh(version, 4000);
        let mut step = 0u64;
        let attempt = Setup::new(&simulated).run(move |guest| {
            step += 1;
            let page = step.wrapping_mul(7919) % 4000;
            match step % 5 {
                0 => guest.remove(page),
                1 => guest.replace(page),
                2 if step < 2000 => guest.add(0x20_000 + step),
                _ => guest.write(page, step),
            }
        });
        let report = attempt.result.as_ref().unwrap();
        assert_whole(&attempt);
        assert!(report.report["xen"]["last_discovery"].is_object(), "it was looked at again");
        assert_another_save_succeeds(&simulated);
    }
}

#[test]
fn whatever_ends_a_save_the_domain_runs_on_without_a_log_and_can_be_saved_again() {
    let megabyte = 1 << 20;
    let base = |simulated: &Arc<Simulated>| Setup::new(simulated);
    type Make = fn(Setup, usize) -> Setup;
    let cases: [(&str, &str, Make); 7] = [
        ("a receiver that dies", "broke", |setup, at| Setup { receiver: Receiver::Dies(at), ..setup }),
        ("a receiver that stops reading", "interrupted", |setup, at| Setup {
            receiver: Receiver::Stalls(at),
            ..setup
        }),
        ("SIGTERM", "interrupted", |setup, at| Setup { abort_after: Some(at), ..setup }),
        ("a refused logdirty switch", "switch qemu's dirty logging on", |setup, _| Setup {
            answers: Answers { switch: -1, ..WILLING },
            ..setup
        }),
        ("a guest that does not suspend", "could not suspend", |setup, _| Setup {
            answers: Answers { suspend: 0, stops: false, ..WILLING },
            ..setup
        }),
        ("a guest that crashes instead", "is not suspended", |setup, _| Setup {
            answers: Answers { stops: false, ..WILLING },
            ..setup
        }),
        ("a receiver that dies in the end", "broke", |setup, _| Setup {
            receiver: Receiver::Dies(15 * (1 << 20)),
            ..setup
        }),
    ];
    for (name, says, make) in cases {
        let simulated = Simulated::pvh(OLD, 4000);
        let attempt = make(base(&simulated), 3 * megabyte).run(writer(4000));
        let error = attempt.result.as_ref().expect_err(name).to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{name}: {error}");
        assert_another_save_succeeds(&simulated);
    }
}

#[test]
fn a_hypercall_that_fails_at_any_point_ends_the_save_and_leaves_no_log() {
    let calls = [
        Call::DomainInfo,
        Call::MaximumGpfn,
        Call::PageTypes,
        Call::LogDirtyClean,
        Call::MapBatch,
        Call::CpuPolicy,
        Call::TscInfo,
        Call::HvmContext,
        Call::HvmParam,
    ];
    for call in calls {
        for successes in [0, 1, 4] {
            let simulated = Simulated::pvh(OLD, 3000);
            simulated.guest().fail(call, successes, libc::EFAULT);
            let attempt = Setup::new(&simulated).run(writer(3000));
            match attempt.result {
                // It was not called that often.
                Ok(_) => drop(assert_whole(&attempt)),
                Err(error) => assert!(!error.to_string().contains('\n'), "{call:?}: {error}"),
            }
            assert!(!simulated.guest().is_logging(), "{call:?} after {successes}");
        }
    }
}

#[test]
fn domains_of_another_kind_are_left_to_the_stock_helper_before_anything_is_touched() {
    let simulated = Simulated::pvh(OLD, 10);
    simulated.guest().info.hvm = false;
    let attempt = Setup::new(&simulated).run(|_| {});
    assert!(matches!(attempt.result, Err(SaveError::NotOurs(_))), "{:?}", attempt.result);
    assert_eq!(attempt.ours, 0);
    assert!(attempt.stream.is_empty() && attempt.log.is_empty() && attempt.at_suspend.is_none());
}
