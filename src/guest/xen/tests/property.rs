//! Whatever a guest does while it is saved, what was sent is what it holds at the stop.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::Saver;
use crate::guest::xen::simulated::{Guest, NEW, OLD, Simulated};
use crate::guest::xen::windows::WindowLimits;
use crate::guest::xen::{FinalMapping, XenSettings};
use crate::sys::xen::tally::Call;

/// What may happen during a migration.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Add(u64),
    Remove(u64),
    Replace(u64),
    Special(u64),
    Sample,
    Send(usize),
}

/// Page numbers of the guest in the property below: some chunks, most of them with holes.
const SPACE: u64 = 512 * 3 - 100;

/// Page numbers behind them that a test has for itself.
const SPARE: u64 = 80;

/// Has something happen to a guest; a page that is there already does not come, and Xen's own pages stay as they are.
fn play(guest: &mut Guest, step: &Step) {
    let is_ram = |guest: &Guest, gfn: u64| guest.image_of(gfn).is_some();
    match *step {
        Step::Write(gfn, word) => guest.write(gfn, word),
        Step::Add(gfn) if !guest.has(gfn) => guest.add(gfn),
        Step::Remove(gfn) => guest.remove(gfn),
        Step::Replace(gfn) if is_ram(guest, gfn) => guest.replace(gfn),
        Step::Special(gfn) => guest.add_special(gfn),
        _ => {}
    }
}

fn guest_step() -> impl Strategy<Value = Step> {
    // Few pages, so that the same is hit again and again.
    let gfn = || (0u64..3, 0u64..12).prop_map(|(chunk, page)| (chunk * 512 + page * 37).min(SPACE - 1));
    prop_oneof![
        6 => (gfn(), 1u64..1000).prop_map(|(gfn, word)| Step::Write(gfn, word)),
        2 => gfn().prop_map(Step::Add),
        2 => gfn().prop_map(Step::Remove),
        2 => gfn().prop_map(Step::Replace),
        1 => gfn().prop_map(Step::Special),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => guest_step(),
        2 => Just(Step::Sample),
        2 => (0usize..40).prop_map(Step::Send),
        // All of them, so that a page is not sent just because it was due anyway.
        3 => Just(Step::Send(usize::MAX)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Steps in the middle of calls included. Excluded is only what escapes: see `shared.rs`.
    #[test]
    fn whatever_the_guest_does_what_was_sent_is_what_it_holds_at_the_stop(
        version in prop_oneof![Just(OLD), Just(NEW)],
        final_mapping in prop_oneof![Just(FinalMapping::OnEvidence), Just(FinalMapping::Always)],
        pages in 1usize..1600,
        at_its_limit: bool,
        at_first in proptest::collection::vec(guest_step(), 0..30),
        steps in proptest::collection::vec(step(), 0..60),
        in_calls in proptest::collection::vec((0usize..6, guest_step()), 0..20),
    ) {
        let simulated = Simulated::new(version, SPACE + SPARE);
        (0..SPACE).filter(|gfn| gfn % 3 != 1).for_each(|gfn| simulated.guest().add(gfn));
        if at_its_limit {
            simulated.guest().info.max_pages = 0;
        }
        at_first.iter().for_each(|step| play(&mut simulated.guest(), step));
        let windows = WindowLimits { pages, windows: 3 };
        let mut saver = Saver::start(&simulated, XenSettings { windows, final_mapping, ..XenSettings::default() });
        let mut in_calls = in_calls.into_iter();
        let mut due = in_calls.next();
        let mut counted = simulated.guest().tot_pages();
        let mut came = simulated.guest().came;
        let (mut asked, mut before) = ((counted, came), Call::MaximumGpfn);
        let live = Arc::new(Mutex::new(true));
        let alive = live.clone();
        let mut spare = SPACE..SPACE + SPARE;
        simulated.set_hook(move |guest, call| {
            while let Some((wait, step)) = due.as_mut().filter(|_| *alive.lock().unwrap()) {
                if *wait > 0 {
                    *wait -= 1;
                    break;
                }
                play(guest, step);
                due = in_calls.next();
            }
            if call == Call::DomainInfo {
                if guest.came != came && guest.tot_pages() == counted {
                    guest.add(spare.next().unwrap());
                }
                asked = (guest.tot_pages(), guest.came);
            }
            // A sample asks for the count before it clears, or right after it.
            let is_sample = match version {
                OLD => call == Call::LogDirtyClean,
                _ => call == Call::DomainInfo && before == Call::LogDirtyClean,
            };
            if is_sample {
                (counted, came) = asked;
            }
            before = call;
        });
        for step in &steps {
            match step {
                Step::Sample => saver.sample(),
                Step::Send(pages) => saver.send(*pages),
                other => play(&mut simulated.guest(), other),
            }
        }
        *live.lock().unwrap() = false;
        saver.finish(&simulated);
    }
}
