//! Huge pages for large tables on the heap: asked for, never required.
//!
//! The memory of a table is reserved when it is made and backed as it is touched; with transparent huge pages that is
//! 2 MiB at a time, and a walk through it misses the TLB 512 times less often.

use std::fs;

/// The huge page that transparent huge pages come in on x86.
const HUGE_PAGE: usize = 2 << 20;

/// Asks the kernel to back what `table` has reserved with huge pages. Silent where there are none, and
/// for a table too small to hold one.
pub fn ask_for<T>(table: &Vec<T>) {
    if let Some((start, len)) = huge_part(table) {
        // SAFETY: the range lies within one allocation of the caller's, and the advice leaves its contents alone.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_HUGEPAGE) };
    }
}

/// Bytes of `table` that are in huge pages now, as the kernel reports it. Reads /proc/self/smaps; 0 if that cannot be
/// read. Where a neighbour was advised too, the two are one mapping, and this is at most what the table has reserved.
pub fn huge_bytes<T>(table: &Vec<T>) -> usize {
    let Some((start, len)) = huge_part(table) else { return 0 };
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    anon_huge_bytes(&smaps, start).unwrap_or(0).min(len)
}

/// Address and size of the part of a table, with what is reserved for it, that huge pages can back; none if that is less
/// than one. Being advised, it is a mapping of its own.
fn huge_part<T>(table: &Vec<T>) -> Option<(usize, usize)> {
    let start = table.as_ptr().addr();
    let end = (start + table.capacity() * size_of::<T>()) / HUGE_PAGE * HUGE_PAGE;
    let start = start.next_multiple_of(HUGE_PAGE);
    (end > start).then(|| (start, end - start))
}

/// How much of the mapping that holds `address` is in transparent huge pages, by the text of /proc/self/smaps.
fn anon_huge_bytes(smaps: &str, address: usize) -> Option<usize> {
    let holds = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
        Some(range.contains(&address))
    };
    let mapping = smaps.lines().skip_while(|line| holds(line) != Some(true));
    let kib = mapping.skip(1).find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    Some(kib.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn asking_changes_nothing_but_the_backing() {
        let mut table: Vec<u64> = Vec::with_capacity(1 << 20);
        ask_for(&table);
        table.extend(0..1 << 20);
        assert!(table.iter().enumerate().all(|(index, value)| index as u64 == *value));
        println!("an 8 MiB table has {} bytes in huge pages", huge_bytes(&table));
        ask_for(&Vec::<u64>::new());
        assert_eq!(huge_bytes(&Vec::<u64>::new()), 0);
    }

    #[test]
    fn the_mapping_that_holds_an_address_is_found() {
        let smaps = "1000-3000 rw-p 0\nAnonHugePages:       0 kB\n3000-800000 rw-p 0\nRss: 4 kB\nAnonHugePages:    2048 kB\n";
        assert_eq!(anon_huge_bytes(smaps, 0x2fff), Some(0));
        assert_eq!(anon_huge_bytes(smaps, 0x3000), Some(2 << 20));
        assert_eq!(anon_huge_bytes(smaps, 0x900_0000), None);
    }
}
