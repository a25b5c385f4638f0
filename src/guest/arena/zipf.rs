//! Zipf's law in constant time and constant memory.
//!
//! W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates from monotone discrete
//! distributions", ACM TOMACS 6(3), 1996. The formula YCSB uses (Gray et al., 1994) is as quick for each sample
//! but first needs the harmonic sum over all ranks. That would be paid in every resume, which is downtime.

use super::rng::Rng;

/// The skew of YCSB's zipfian request distribution.
const EXPONENT: f64 = 0.99;

/// Draws rank `k` of `0..ranks` with a probability proportional to `1 / (k + 1)^0.99`.
pub(super) struct Zipf {
    ranks: f64,
    /// The integral of the density up to 1.5, less the density at 1: the lower end of the area drawn from.
    area_first: f64,
    /// The integral of the density up to `ranks + 0.5`: the upper end of the area drawn from.
    area_last: f64,
    /// A rank this close above the drawn abscissa is accepted without evaluating the density.
    surely_within: f64,
}

impl Zipf {
    /// A distribution over `ranks` ranks; at least one.
    pub(super) fn new(ranks: u64) -> Self {
        let ranks = ranks.max(1) as f64;
        Self {
            ranks,
            area_first: area(1.5) - 1.0,
            area_last: area(ranks + 0.5),
            surely_within: 2.0 - abscissa(area(2.5) - density(2.0)),
        }
    }

    pub(super) fn sample(&self, rng: &mut Rng) -> u64 {
        loop {
            let drawn = self.area_last + rng.unit() * (self.area_first - self.area_last);
            let x = abscissa(drawn);
            let rank = x.round().clamp(1.0, self.ranks);
            if rank - x <= self.surely_within || drawn >= area(rank + 0.5) - density(rank) {
                return rank as u64 - 1;
            }
        }
    }
}

/// The density that dominates rank `x`.
fn density(x: f64) -> f64 {
    (-EXPONENT * x.ln()).exp()
}

/// The density's integral from 1 to `x`: `(x^(1 - s) - 1) / (1 - s)`, free of cancellation near `s = 1`.
fn area(x: f64) -> f64 {
    ((1.0 - EXPONENT) * x.ln()).exp_m1() / (1.0 - EXPONENT)
}

/// The inverse of [`area`].
fn abscissa(area: f64) -> f64 {
    (((1.0 - EXPONENT) * area).ln_1p() / (1.0 - EXPONENT)).exp()
}

#[cfg(test)]
mod tests {
    use super::super::rng::Purpose;
    use super::*;

    #[test]
    fn frequencies_match_the_exact_probabilities() {
        const SAMPLES: u64 = 400_000;
        for ranks in [1u64, 2, 3, 10, 200] {
            let zipf = Zipf::new(ranks);
            let mut rng = Rng::new(ranks, Purpose::Operations);
            let mut counts = vec![0u64; ranks as usize];
            for _ in 0..SAMPLES {
                counts[zipf.sample(&mut rng) as usize] += 1;
            }
            let weight = |rank: usize| ((rank + 1) as f64).powf(-EXPONENT);
            let total: f64 = (0..counts.len()).map(weight).sum();
            for (rank, &count) in counts.iter().enumerate() {
                let p = weight(rank) / total;
                let expected = p * SAMPLES as f64;
                let deviation = (expected * (1.0 - p)).sqrt();
                let off = (count as f64 - expected).abs();
                assert!(off <= 5.0 * deviation, "rank {rank} of {ranks}: {count}, expected {expected}");
            }
        }
    }

    #[test]
    fn the_head_of_a_large_distribution_has_its_share() {
        // 786,432 keys: what the kv workload has in 512 MiB. The first rank's share is 1 / sum(k^-0.99).
        let ranks = 786_432u64;
        let harmonic: f64 = (1..=ranks).map(|k| (k as f64).powf(-EXPONENT)).sum();
        let zipf = Zipf::new(ranks);
        let mut rng = Rng::new(3, Purpose::Operations);
        let first = (0..200_000).filter(|_| zipf.sample(&mut rng) == 0).count() as f64;
        let expected = 200_000.0 / harmonic;
        assert!((first - expected).abs() < 5.0 * expected.sqrt(), "{first}, expected {expected}");
    }
}
