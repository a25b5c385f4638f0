//! Whole migrations in one thread, by a clock that is set by hand: scanner, forecast, dealer, mappers, rings and slots are
//! the real ones, the guest, the link and the receiver are simulated. Who takes the next step, and what time that takes, comes
//! out of a seed, so that each migration can be repeated step by step.
//!
//! What must hold of each: a migration ends, with what the guest held when it stopped at the destination, whatever the guest
//! does meanwhile; or it is called off, and that only if there was a reason.

mod link;
mod machine;
mod migration;

use proptest::prelude::*;

use self::machine::Load;
use self::migration::{Ended, Scenario, Trouble, migrate};
use crate::forecast::{OnNoConvergence, PolicyKind};
use crate::pipeline::lanes::Wire;

fn load() -> impl Strategy<Value = Load> {
    (
        proptest::collection::vec(prop_oneof![3 => 0usize..40, 1 => 40usize..100], 1..6),
        prop_oneof![0u32..200, 200u32..20_000],
        0u64..=100,
        0u64..=60,
        prop_oneof![Just(0u64), 1u64..200],
    )
        .prop_map(|(pages, writes_per_s, hot_percent, zero_percent, balloon_permille)| Load {
            pages,
            writes_per_s,
            hot_percent,
            zero_percent,
            balloon_permille,
        })
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        8 => Just(Trouble::None),
        1 => (0u32..30).prop_map(Trouble::LogFails),
        1 => (0u64..400).prop_map(Trouble::LinkBreaks),
        1 => (0u64..20_000).prop_map(Trouble::Abort),
    ]
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let policy = prop_oneof![
        1 => Just(PolicyKind::Xen),
        1 => Just(PolicyKind::XenSkip),
        1 => Just(PolicyKind::Paper),
        1 => Just(PolicyKind::Heat),
        3 => Just(PolicyKind::Ar),
    ];
    let no_convergence = prop_oneof![
        2 => Just(OnNoConvergence::Stop),
        1 => Just(OnNoConvergence::Abort),
        1 => Just(OnNoConvergence::Throttle)
    ];
    let wire =
        prop_oneof![Just((Wire::Standard, 1usize)), (1usize..4).prop_map(|lanes| (Wire::Pagecast, lanes))];
    let speeds = (prop_oneof![50u32..2000, 2000u32..100_000], proptest::option::of(100u32..50_000));
    let times = (5u64..400, 1u64..100, 200u64..4000, 0u64..20, proptest::option::of(1u64..20));
    let sizes = ((0u32..5).prop_map(|power| 1usize << power), 1usize..8);
    (
        any::<u64>(),
        load(),
        policy,
        no_convergence,
        wire,
        speeds,
        times,
        sizes,
        prop::bool::weighted(0.95),
        trouble(),
    )
        .prop_map(
            |(
                seed,
                load,
                policy,
                on_no_convergence,
                (wire, lanes),
                (link, cap),
                times,
                sizes,
                live,
                trouble,
            )| Scenario {
                seed,
                load,
                policy,
                on_no_convergence,
                wire,
                lanes,
                link_pages_per_s: link,
                cap_pages_per_s: cap,
                budget_ms: times.0,
                interval_ms: times.1,
                max_time_ms: times.2,
                look_us: times.3,
                share_percent: times.4,
                ring: sizes.0,
                slots: sizes.1,
                live,
                trouble,
            },
        )
}

proptest! {
    // As many as PROPTEST_CASES says: `scripts/test` runs 20,000 of them.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn simulated_migrations_end_with_what_the_guest_held_at_the_stop(scenario in scenario()) {
        match migrate(&scenario) {
            Ended::Moved { differing } => prop_assert!(differing.is_empty(), "{differing:?} differ"),
            Ended::CalledOff => prop_assert_eq!(scenario.on_no_convergence, OnNoConvergence::Abort),
            Ended::Broken => prop_assert_ne!(scenario.trouble, Trouble::None),
        }
    }

    #[test]
    fn a_simulated_migration_can_be_repeated(scenario in scenario()) {
        prop_assert_eq!(migrate(&scenario), migrate(&scenario));
    }
}
