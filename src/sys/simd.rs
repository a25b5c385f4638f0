//! The machine's own instructions: code compiled a second time for what x86 has had since 2013 and chosen when it runs,
//! and hints to the cache. The code itself stays safe and portable; only the choice is made here.

/// Runs `work`, compiled for AVX2, POPCNT, BMI and LZCNT where the machine has them and for any machine otherwise. What
/// `work` calls gains by it only where it is inlined, so the body belongs in an `#[inline(always)]` function.
///
/// Without it a `count_ones` is a dozen instructions. A line of a bitmap (512 bits) counted into a page set: see
/// docs/forecast-speed.md.
#[inline]
pub fn at_best<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if has_wide() {
        // SAFETY: the machine has the instructions that `wide` is compiled for, as was just found out.
        return unsafe { wide(work) };
    }
    work()
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
fn wide<R>(work: impl FnOnce() -> R) -> R {
    work()
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

    #[test]
    fn both_ways_give_the_same_result() {
        let words: Vec<u64> = (0..1000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let count = || words.iter().map(|word| word.count_ones()).sum::<u32>();
        assert_eq!(at_best(count), count());
        prefetch(&words[0]);
    }
}
