//! Replays traces under the ranking policies and prints, for each migration, how it went and a digest of every
//! decision: the tool with which a change that is meant to keep decisions is checked.
//!
//! usage: cargo run --release --example replay_digest -- TRACE.pct.zst...

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::process::ExitCode;

use pagecast::forecast::{Engine, OnNoConvergence, PolicyKind};
use pagecast::page::Pfn;
use pagecast::trace::format::Trace;
use pagecast::trace::replay::{Observer, Setting, StopAt, replay};

/// Hashes what is sent, in the order in which it is.
#[derive(Default)]
struct Digest(DefaultHasher);

impl Observer for Digest {
    fn round(&mut self, round: usize, sent: &[Pfn], _: &Engine) {
        (round, sent).hash(&mut self.0);
    }
}

fn main() -> ExitCode {
    println!(
        "{:28} {:5} {:>6} {:>7} {:>6} {:>8} {:>8} {:>6} {:>10} {:>9}  digest",
        "trace", "policy", "stop", "base_s", "start", "tmt_s", "rho", "stopat", "converged", "ms/round"
    );
    for path in std::env::args().skip(1) {
        let trace = match Trace::open(Path::new(&path)) {
            Ok(trace) => trace,
            Err(error) => {
                eprintln!("replay_digest: {error}");
                return ExitCode::FAILURE;
            }
        };
        for policy in [PolicyKind::Heat, PolicyKind::Ar] {
            for (stop, base_s, start) in [
                (StopAt::Own, 2.0, 1),
                (StopAt::Budget, 2.0, 100),
                (StopAt::Budget, 4.0, 1),
                (StopAt::Own, 8.0, 20),
            ] {
                let pages_per_round = trace.nr_pages() as f64 * trace.period_s() / base_s;
                let setting = Setting {
                    policy,
                    stop,
                    start,
                    pages_per_round,
                    budget_s: 0.1,
                    max_time_s: 40.0,
                    on_no_convergence: OnNoConvergence::Stop,
                };
                let mut digest = Digest::default();
                let outcome = replay(&trace, &setting, &mut digest);
                let rounds = (outcome.stop_round - start).max(1) as f64;
                println!(
                    "{:28} {:5} {:>6} {:>7.1} {:>6} {:>8.4} {:>8.5} {:>6} {:>10} {:>9.3}  {:016x}",
                    Path::new(&path).file_name().map(|name| name.to_string_lossy()).unwrap_or_default(),
                    policy.name(),
                    format!("{stop:?}"),
                    base_s,
                    start,
                    outcome.tmt_s,
                    (outcome.sent + outcome.backlog) as f64 / trace.nr_pages() as f64,
                    outcome.stop_round,
                    outcome.converged,
                    outcome.forecast_time.as_secs_f64() * 1e3 / rounds,
                    digest.0.finish()
                );
            }
        }
    }
    ExitCode::SUCCESS
}
