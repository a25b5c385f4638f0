use super::super::simulation::{Simulation, config};
use super::*;
use crate::forecast::{Link, PolicyKind};
use proptest::prelude::*;

const RANKED: [PolicyKind; 2] = [PolicyKind::Heat, PolicyKind::Ar];

/// 4096 pages after 20 samples; pages 0..64 were written in every one, 512..576 in the first only.
fn with_history(kind: PolicyKind, pages_per_s: f64) -> Simulation {
    let mut guest = Simulation::new(kind, config(4096), pages_per_s);
    for step in 0..20 {
        (0..64).for_each(|page| guest.write(page));
        if step == 0 {
            (512..576).for_each(|page| guest.write(page));
        }
        guest.now += Duration::from_millis(50);
        guest.sample();
    }
    guest
}

#[test]
fn cold_goes_before_hot_and_each_plan_ascends() {
    for kind in RANKED {
        let mut guest = with_history(kind, 2000.0);
        let mut sent = Vec::new();
        while let (Next::Batch, batch) = guest.batch(50) {
            assert!(batch.is_sorted(), "{kind}");
            sent.extend(batch);
        }
        let place = |page: u64| sent.iter().position(|sent| *sent == page).expect("all were sent");
        let (hot, once, never) = (place(10), place(520), place(3000));
        assert!(never < once && once < hot, "{kind}: {never} {once} {hot}");
        assert!(place(600) > never, "{kind}: a page never written takes its chance from its chunk");
        assert_eq!(sent.len(), 4096);
    }
}

#[test]
fn the_link_is_never_idle_while_anything_is_pending() {
    for kind in RANKED {
        let mut guest = with_history(kind, 2000.0);
        while !guest.engine.pending().is_empty() {
            let (next, batch) = guest.batch(64);
            assert_eq!((next, batch.is_empty()), (Next::Batch, false), "{kind}");
        }
        assert_eq!(guest.batch(64), (Next::Idle, vec![]));
    }
}

#[test]
fn what_ranks_below_the_cut_is_deferred() {
    for kind in RANKED {
        let mut guest = with_history(kind, 20_000.0);
        guest.batch(100);
        assert_eq!(guest.engine.deferred(), 4096 - 1000, "{kind}: a plan is 20000/s times 50 ms");
        assert_eq!(guest.engine.pending().len(), 4096 - 100);
    }
}

/// A guest that was sampled, driven without an engine.
fn ranked_guest(terms: Terms, samples: &[Vec<(u64, u64)>], looks: u64) -> (Ranked, WorkingSet, PageSet) {
    let config = config(NR_PAGES);
    let mut ranked = Ranked::new(config, terms);
    ranked.looks = looks;
    let mut working_set = WorkingSet::new(&config);
    for (number, runs) in samples.iter().enumerate() {
        let mut dirty = PageSet::empty(NR_PAGES);
        runs.iter().for_each(|(first, count)| dirty.insert_run(Pfn(*first), *count.min(&(NR_PAGES - first))));
        let sample = Sample { at: Duration::from_millis(50 * (number as u64 + 1)), dirty: &dirty };
        ranked.on_sample(&sample, &working_set);
        working_set.record_with(&sample, |step| ranked.on_chunk(&dirty, step));
        ranked.end_sample(&working_set);
    }
    (ranked, working_set, PageSet::full(NR_PAGES))
}

const NR_PAGES: u64 = 6 * 512 - 100;

/// Takes out of `pending` what one plan hands out in batches of 64.
fn one_plan(ranked: &mut Ranked, working_set: &WorkingSet, pending: &mut PageSet, budget: u64) -> Vec<Pfn> {
    let link = Link { pages_per_s: 1000.0, in_flight: 0, sent: 0 };
    let mut sent = Vec::new();
    let view = View { now: working_set.last_sample_at(), link: &link, pending, working_set };
    let mut plan = ranked.make_plan(&view, budget);
    while plan.left > 0 {
        let before = sent.len();
        let view = View { now: working_set.last_sample_at(), link: &link, pending, working_set };
        ranked.follow(&mut plan, &view, 64, &mut sent);
        sent[before..].iter().for_each(|pfn| assert!(pending.remove(*pfn), "{pfn} was not pending"));
    }
    sent
}

fn the_best_by_rank_and_number(
    ranked: &mut Ranked,
    working_set: &WorkingSet,
    pending: &PageSet,
    budget: u64,
) -> Vec<Pfn> {
    ranked.refresh(working_set);
    let mut by_rank: Vec<(i16, Pfn)> = pending
        .iter()
        .map(|pfn| {
            let chunk = pfn.chunk();
            let state = ranked.states.get(chunk).cloned().unwrap_or_default();
            let shift = ranked.shift(chunk, &state) + RANK_OFFSET;
            let bucket = match ranked.members(chunk, shift, working_set) {
                Some(members) if members.ages.0[pfn.in_chunk()] > 0 => {
                    ranked.bucket(&members, pfn.in_chunk())
                }
                _ => {
                    let most = ranked.most(chunk).unwrap_or(i32::MAX);
                    bucket_of(ranked.age_ranks.never_written_q4().min(most) * BUCKETS_IN_A_RANK + shift)
                }
            };
            (-bucket, pfn)
        })
        .collect();
    by_rank.sort_unstable();
    by_rank.truncate(budget as usize);
    let mut best: Vec<Pfn> = by_rank.into_iter().map(|(_, pfn)| pfn).collect();
    best.sort_unstable();
    best
}

fn check_plans(terms: Terms, samples: &[Vec<(u64, u64)>], budget: u64) {
    let (mut ranked, working_set, mut pending) = ranked_guest(terms, samples, LOOKS);
    while !pending.is_empty() {
        let expected = the_best_by_rank_and_number(&mut ranked, &working_set, &pending, budget);
        assert_eq!(one_plan(&mut ranked, &working_set, &mut pending, budget), expected);
    }
}

fn samples() -> impl Strategy<Value = Vec<Vec<(u64, u64)>>> {
    let run = (0u64..NR_PAGES, prop_oneof![1u64..4, 100u64..900]);
    proptest::collection::vec(proptest::collection::vec(run, 0..6), 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_plan_is_the_best_pages_by_rank_and_then_by_number(samples in samples(), budget in 1u64..900) {
        check_plans(Terms::empty(), &samples, budget);
        check_plans(Terms::all(), &samples, budget);
    }

    #[test]
    fn with_more_written_pages_than_are_looked_at_every_page_still_goes(
        samples in samples(),
        budget in 1u64..40,
    ) {
        let (mut ranked, working_set, mut pending) = ranked_guest(Terms::all(), &samples, 50);
        let mut sent = 0;
        while !pending.is_empty() {
            let plan = one_plan(&mut ranked, &working_set, &mut pending, budget);
            prop_assert!(!plan.is_empty() && plan.is_sorted());
            sent += plan.len() as u64;
        }
        prop_assert_eq!(sent, NR_PAGES);
    }
}

#[test]
fn of_buffers_used_in_turn_none_that_is_due_soon_goes_first_once_that_was_seen() {
    // Twelve buffers of a hundred pages; everything else was never written and is not pending.
    let samples: Vec<Vec<(u64, u64)>> = (0..60).map(|sample| vec![(sample % 12 * 100, 100)]).collect();
    let mut first = Vec::new();
    for terms in [Terms::empty(), Terms::HAZARD] {
        let (mut ranked, working_set, _) = ranked_guest(terms, &samples, LOOKS);
        let mut pending = PageSet::empty(NR_PAGES);
        pending.insert_run(Pfn(0), 1200);
        first.push(one_plan(&mut ranked, &working_set, &mut pending, 100)[0].0 / 100);
    }
    assert_eq!(first[0], 0, "by age that which was written twelve samples ago, and comes next");
    assert!((4..=11).contains(&first[1]), "not one of the four that come next: {first:?}");
}

#[test]
fn pages_of_one_rank_go_in_ascending_order() {
    for kind in RANKED {
        let mut guest = Simulation::new(kind, config(512 * 64), 20_000.0);
        assert_eq!(guest.batch(1000).1, (0..1000).collect::<Vec<_>>(), "{kind}");
    }
}

#[test]
fn state_is_three_bytes_a_page_of_a_written_chunk_and_two_lines_a_chunk() {
    let mut guest = Simulation::new(PolicyKind::Ar, config(1 << 20), 2000.0);
    let before = guest.engine.state_bytes();
    (0..512 * 100).for_each(|page| guest.write(page));
    guest.now += Duration::from_millis(50);
    guest.sample();
    let per_chunk = (guest.engine.state_bytes() - before) as f64 / 100.0;
    assert!((1536.0 + 128.0..1536.0 + 140.0).contains(&per_chunk), "{per_chunk}");
}
