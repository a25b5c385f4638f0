//! The scanner by itself: what waits for room, who sleeps when, and how a slow log spaces samples.

use super::*;

/// A log of a guest that writes nothing.
struct Silent;

impl DirtyLog for Silent {
    fn get_and_clear(&mut self, _: &mut PageSet) -> Result<(), GuestError> {
        Ok(())
    }

    fn peek(&mut self, _: std::ops::Range<u64>, _: &mut PageSet) -> Result<(), GuestError> {
        Ok(())
    }
}

fn engine(policy: crate::forecast::PolicyKind, populated: PageSet) -> Engine {
    let config = crate::forecast::Config {
        nr_pages: populated.nr_pages(),
        pages: populated.len(),
        downtime_budget: Duration::from_millis(300),
        sample_interval: Duration::from_millis(50),
        max_time: Duration::from_secs(3600),
        fixed_downtime: Duration::ZERO,
        on_no_convergence: crate::forecast::OnNoConvergence::Stop,
        linger: 0.0,
    };
    Engine::sparse(policy, config, populated)
}

/// The scanner's ends with a single lane.
fn one_lane(
    lane: Producer<Batch>,
    orders: Receiver<Order>,
    events: Sender<Event>,
    stages: Vec<Thread>,
) -> Links {
    Links { lanes: vec![lane], zero_notes: vec![], outlets: vec![], orders, events, stages }
}

#[test]
fn what_waits_for_room_in_a_ring_goes_on_as_soon_as_there_is_some() {
    // A page in each of 600 chunks, all of which have to be opened: a batch for each page, and room for two.
    let mut populated = PageSet::empty(600 * 512);
    for chunk in 0..600 {
        populated.insert(Pfn(chunk * 512));
    }
    let engine = engine(crate::forecast::PolicyKind::Xen, populated.clone());
    let (to_lane, mut lane) = crate::pipeline::ring::ring(2);
    let (order, orders) = std::sync::mpsc::channel();
    let (events, _seen) = std::sync::mpsc::channel();
    let links = one_lane(to_lane, orders, events, vec![]);
    let shared = Arc::new(Shared::new(1, false));
    let slow = Cadence {
        live: true,
        sample_interval: Duration::from_millis(50),
        share: None,
        bandwidth: Some(100_000),
    };
    let openings = Some(Openings::new(populated));
    let clock = Clock::Real(std::time::Instant::now());
    let scanner = Scanner::new(Box::new(Silent), engine, openings, links, shared.clone(), slow, clock);
    let scanning = std::thread::spawn(move || scanner.run());
    let mut handed_out = 0;
    while handed_out < 600 {
        match lane.pop() {
            Ok(batch) => {
                handed_out += batch.pages().len() as u64;
                shared.lanes[0].entries.store(handed_out, Ordering::Release);
            }
            Err(_) => std::thread::yield_now(),
        }
    }
    drop(order);
    scanning.join().unwrap();
}

#[test]
fn the_stages_are_left_in_peace_until_the_guest_stands_still_and_woken_then() {
    let (to_lane, mut lane) = crate::pipeline::ring::ring(16);
    let (order, orders) = std::sync::mpsc::channel();
    let (events, seen) = std::sync::mpsc::channel();
    let stages = vec![std::thread::current()];
    let links = one_lane(to_lane, orders, events, stages);
    let shared = Arc::new(Shared::new(1, false));
    let ms = Duration::from_millis;
    let cadence = Cadence { live: true, sample_interval: ms(1), share: None, bandwidth: Some(1 << 30) };
    let engine = engine(crate::forecast::PolicyKind::Xen, PageSet::full(512));
    let clock = Clock::Real(std::time::Instant::now());
    let scanner = Scanner::new(Box::new(Silent), engine, None, links, shared.clone(), cadence, clock);
    let scanning = std::thread::spawn(move || scanner.run());
    let stop = loop {
        if let Ok(batch) = lane.pop() {
            assert!(!shared.is_quiet(), "this is not sent yet");
            shared.lanes[0].entries.fetch_add(batch.pages().len() as u64, Ordering::Release);
        }
        if let Ok(event) = seen.try_recv() {
            break event;
        }
    };
    assert!(matches!(stop, Event::Stop(_)), "{stop:?}");
    while !shared.is_quiet() {
        std::thread::yield_now();
    }
    order.send(Order::Final).unwrap();
    let (since, patience) = (std::time::Instant::now(), Duration::from_secs(60));
    std::thread::park_timeout(patience);
    assert!(since.elapsed() < patience, "nobody woke the stages");
    assert!(!shared.is_quiet());
    scanning.join().unwrap();
}

/// A log that holds the guest up for so long, one time after the other.
struct Slow(Vec<Duration>, Duration);

impl DirtyLog for Slow {
    fn get_and_clear(&mut self, _: &mut PageSet) -> Result<(), GuestError> {
        self.1 = self.0.remove(0);
        Ok(())
    }

    fn peek(&mut self, _: std::ops::Range<u64>, _: &mut PageSet) -> Result<(), GuestError> {
        Ok(())
    }

    fn held_up(&self) -> Option<Duration> {
        Some(self.1)
    }
}

#[test]
fn one_slow_sample_does_not_put_the_next_off_but_slow_ones_do() {
    let ms = Duration::from_millis;
    let log = Slow(vec![ms(10), ms(3000), ms(10), ms(40), ms(50)], Duration::ZERO);
    let (to_lane, _lane) = crate::pipeline::ring::ring(2);
    let (_order, orders) = std::sync::mpsc::channel();
    let (events, _seen) = std::sync::mpsc::channel();
    let links = one_lane(to_lane, orders, events, vec![]);
    let cadence = Cadence { live: true, sample_interval: ms(50), share: Some(0.02), bandwidth: None };
    let clock = Clock::Simulated(Arc::default());
    let engine = engine(crate::forecast::PolicyKind::Ar, PageSet::full(512));
    let shared = Arc::new(Shared::new(1, false));
    let mut scanner = Scanner::new(Box::new(log), engine, None, links, shared, cadence, clock);
    let next: Vec<Duration> = (0..5)
        .map(|_| {
            scanner.sample(false).unwrap();
            scanner.next_sample
        })
        .collect();
    assert_eq!(next, [ms(1000), ms(1000), ms(1000), ms(1000), ms(4000)]);
}
