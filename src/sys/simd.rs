//! The machine's own instructions: code compiled a second time for what x86 has had since 2013 and chosen when it runs,
//! and hints to the cache. The code itself stays safe and portable; only the choice is made here.

/// Something to be done fast. `run` has to be `#[inline(always)]`, and what it calls in its loops too, for only what is
/// inlined is compiled for the instructions chosen. A closure would not do: it is called from two places, and so the
/// compiler keeps it out of line and compiles it for any machine (seen on insert_bitmap: five times slower).
pub trait Work {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run(self) -> Self::Output;
}

/// Runs `work`, compiled for AVX2, POPCNT, BMI and LZCNT where the machine has them and for any machine otherwise.
/// Without POPCNT a `count_ones` is a dozen instructions. docs/forecast-speed.md has what it gains.
#[inline]
pub fn at_best<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if has_wide() {
        // SAFETY: the machine has the instructions that `wide` is compiled for, as was just found out.
        return unsafe { wide(work) };
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn has_wide() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt,bmi1,bmi2,lzcnt")]
fn wide<W: Work>(work: W) -> W::Output {
    work.run()
}

/// Asks for the cache line at `place`, which will be needed soon. A hint: it changes nothing that a program can see.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address is allowed, and this one is that of a live reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(place).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    struct Count<'a>(&'a [u64]);

    impl Work for Count<'_> {
        type Output = u32;

        #[inline(always)]
        fn run(self) -> u32 {
            self.0.iter().map(|word| word.count_ones()).sum()
        }
    }

    #[test]
    fn both_ways_give_the_same_result() {
        let words: Vec<u64> = (0..1000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        assert_eq!(at_best(Count(&words)), Count(&words).run());
        prefetch(&words[0]);
    }
}
