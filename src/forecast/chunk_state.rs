//! What is known of a chunk as a whole: two cache lines for each chunk that was ever written.
//!
//! A number that fades with time is stored with the time at which it was right, and faded when it is next looked at. All of
//! it in integers, so that every machine decides alike.

use super::ar::Activity;
use super::log2::{exp2_neg_q30, in_units_q8};
use crate::page_set::CHUNK_WORDS;
use std::time::Duration;

/// The state of one chunk.
#[derive(Clone, Default)]
#[repr(align(64))]
pub(super) struct ChunkState {
    /// Pages that any sample has shown dirty: a line of its own.
    pub written: [u64; CHUNK_WORDS],
    /// Dirty pages per unit, exponential mean.
    pub activity: Fading,
    /// The forecast of the same.
    pub forecast: Activity,
    /// When the latest sample with a write was taken, in 256ths of a unit.
    written_at_q8: u32,
}
const _: () = assert!(size_of::<ChunkState>() == 128);

impl ChunkState {
    /// The latest sample shows `pages` dirty here.
    #[inline]
    pub(super) fn note_written(&mut self, pages: usize, fade: &Fade) {
        self.activity.add(pages, fade);
        self.forecast.observe((pages as u64 * fade.units_q24) >> 16, fade.gained_q16);
        self.written_at_q8 = fade.now_q8;
    }

    /// The latest sample is complete; if it had nothing for this chunk, the series goes on with nothing.
    #[inline]
    pub(super) fn end_sample(&mut self, fade: &Fade) {
        if self.written_at_q8 != fade.now_q8 {
            self.forecast.observe(0, fade.gained_q16);
        }
    }
}

/// How fast a [`Fading`] number fades, and the time of the latest sample.
#[derive(Clone, Copy)]
pub(super) struct Fade {
    unit: Duration,
    memory_s: f64,
    /// Octaves that it loses in a 256th of a unit, in 32 binary places.
    octaves_q32: u64,
    /// Time since the start in 256ths of a unit, saturating: 9 days at 50 ms.
    now_q8: u32,
    /// What one dirty page of the latest sample adds, in 24 binary places.
    gain_q24: u64,
    /// The weight of the latest sample, in 16 binary places.
    gained_q16: i64,
    /// Pages per unit that one page of the latest sample is, in 24 binary places.
    units_q24: u64,
}

impl Fade {
    /// A number that keeps 1/e of itself over `memory_s` seconds.
    pub(super) fn new(memory_s: f64, unit: Duration) -> Self {
        let octaves = unit.as_secs_f64() / memory_s * std::f64::consts::LOG2_E;
        let octaves_q32 = (octaves / 256.0 * (1u64 << 32) as f64) as u64;
        Fade { unit, memory_s, octaves_q32, now_q8: 0, gain_q24: 0, gained_q16: 0, units_q24: 0 }
    }

    /// A sample was taken at `at`, `elapsed` after the one before.
    pub(super) fn begin_sample(&mut self, at: Duration, elapsed: Duration) {
        let elapsed_s = elapsed.as_secs_f64().max(1e-6);
        let gained = 1.0 - (-elapsed_s / self.memory_s).exp();
        self.now_q8 = u32::try_from(in_units_q8(at, self.unit)).unwrap_or(u32::MAX);
        let units = self.unit.as_secs_f64() / elapsed_s * (1 << 24) as f64;
        self.gain_q24 = (gained * units) as u64;
        self.gained_q16 = (gained * 65536.0) as i64;
        self.units_q24 = units as u64;
    }

    #[inline]
    fn keep_q30(&self, since_q8: u32) -> u64 {
        let elapsed_q8 = u64::from(self.now_q8.saturating_sub(since_q8));
        exp2_neg_q30(elapsed_q8.saturating_mul(self.octaves_q32) >> 16)
    }
}

/// Pages per unit, as an exponential mean that is brought up to date when it is looked at.
#[derive(Clone, Copy, Default)]
pub(super) struct Fading {
    level_q16: u32,
    since_q8: u32,
}

impl Fading {
    /// The mean now, in 16 binary places.
    #[inline]
    pub(super) fn now_q16(self, fade: &Fade) -> u64 {
        if self.level_q16 == 0 {
            return 0;
        }
        (u64::from(self.level_q16) * fade.keep_q30(self.since_q8)) >> 30
    }

    /// `pages` were counted in the latest sample.
    #[inline]
    pub(super) fn add(&mut self, pages: usize, fade: &Fade) {
        let level = self.now_q16(fade) + ((pages as u64 * fade.gain_q24) >> 8);
        *self = Fading { level_q16: u32::try_from(level).unwrap_or(u32::MAX), since_q8: fade.now_q8 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The mean as it was kept before: in floating point, and faded in every sample.
        #[test]
        fn fading_when_looked_at_is_fading_all_along(
            samples in proptest::collection::vec((0u64..120, 0usize..512), 1..200),
        ) {
            let unit = Duration::from_millis(50);
            let mut fade = Fade::new(1.0, unit);
            let mut lazy = Fading::default();
            let (mut eager, mut at) = (0.0, Duration::ZERO);
            for (gap_ms, pages) in samples {
                // Two samples out of three find the chunk clean, and leave it alone.
                let pages = if pages % 3 == 0 { pages } else { 0 };
                let gap = Duration::from_millis(gap_ms);
                at += gap;
                fade.begin_sample(at, gap);
                let elapsed_s = gap.as_secs_f64().max(1e-6);
                let keep = (-elapsed_s).exp();
                eager = eager * keep + (1.0 - keep) * 0.05 / elapsed_s * pages as f64;
                if pages > 0 {
                    lazy.add(pages, &fade);
                }
                let now = lazy.now_q16(&fade) as f64 / 65536.0;
                prop_assert!((now - eager).abs() <= 0.002 * eager + 0.001, "{} and {}", now, eager);
            }
        }
    }

    #[test]
    fn a_chunk_left_alone_fades_to_nothing() {
        let mut fade = Fade::new(1.0, Duration::from_millis(50));
        let mut activity = Fading::default();
        fade.begin_sample(Duration::from_millis(50), Duration::from_millis(50));
        activity.add(512, &fade);
        assert!(activity.now_q16(&fade) > 20 << 16);
        fade.begin_sample(Duration::from_secs(1 << 40), Duration::from_secs(60));
        assert_eq!(activity.now_q16(&fade), 0);
    }
}
