//! What /proc/meminfo says.

/// A line of /proc/meminfo without its name, such as `2048 kB`.
pub fn line(name: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Bytes that can be had without swapping; None where the kernel does not say.
pub fn available_bytes() -> Option<u64> {
    let kib: u64 = line("MemAvailable")?.strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
