//! How much memory the process has held.

/// Highest resident memory of this process so far; `None` where the system does not tell.
pub fn peak_memory_bytes() -> Option<u64> {
    entry("/proc/self/status", "VmHWM:")
}

/// Memory that programs can still have without swapping; `None` where the system does not tell.
pub fn free_memory_bytes() -> Option<u64> {
    entry("/proc/meminfo", "MemAvailable:")
}

/// An entry in kB of one of the kernel's tables, in bytes.
fn entry(table: &str, name: &str) -> Option<u64> {
    let table = std::fs::read_to_string(table).ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_was_touched_is_counted() {
        let before = peak_memory_bytes().unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_memory_bytes().unwrap() >= before.min(held.len() as u64));
        assert!(peak_memory_bytes().unwrap() >= held.len() as u64);
    }
}
