//! The machine's random numbers: SplitMix64, whose whole state is one word on the CPU page.

/// The odd constant by which SplitMix64's state moves on: 2^64 divided by the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles a word so that every input bit reaches every output bit (SplitMix64's finaliser).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a stream of random numbers is for. Streams of one seed that serve different ends are unrelated.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// Which chunks are zero pages.
    Layout = 1,
    /// Where a workload's regions lie.
    Regions,
    /// The operations themselves.
    Operations,
}

/// A generator; [`Rng::state`] and [`Rng::at`] carry it to and from the CPU page.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64, purpose: Purpose) -> Self {
        Self(mix(seed ^ mix(purpose as u64)))
    }

    pub(crate) fn at(state: u64) -> Self {
        Self(state)
    }

    pub(crate) fn state(&self) -> u64 {
        self.0
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Uniform in `0..bound`, to within 2^-64 * `bound`; 0 where `bound` is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in `0.0..1.0`.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_covers_its_range_evenly() {
        let mut rng = Rng::new(7, Purpose::Operations);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[rng.below(10) as usize] += 1;
        }
        // One standard deviation is 95.
        assert!(counts.iter().all(|count| count.abs_diff(10_000) < 475), "{counts:?}");
    }

    #[test]
    fn a_generator_goes_on_from_its_state() {
        let mut rng = Rng::new(7, Purpose::Regions);
        rng.next();
        let mut again = Rng::at(rng.state());
        assert_eq!(rng.next(), again.next());
        assert_ne!(Rng::new(7, Purpose::Regions).next(), Rng::new(7, Purpose::Layout).next());
    }
}
