//! `pagecast probe`: what this host offers to a migration.

use std::fmt::Display;
use std::path::Path;

use clap::Args;
use comfy_table::{Table, presets};
use serde_json::{Map, Value, json};

use super::{Exit, Failure};
use crate::guest::arena::host::try_tracking;
use crate::guest::xen;
use crate::sys::slot_memory::SlotMemory;
use crate::sys::{console, cpu, memory_info, uring};

#[derive(Args)]
pub struct ProbeArguments {
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Look at this Xen domain as well: its pages, policies, and what can be done with them. Only reads, but for turning
    /// its dirty logging on and off
    #[arg(long, value_name = "DOMID")]
    domain: Option<u16>,
    /// Version of Xen's domctl interface, where it is not that of the release (decimal or 0x...)
    #[arg(long, value_name = "VERSION", value_parser = interface_version)]
    domctl_version: Option<u32>,
}

fn interface_version(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("{text} is no version number"))
}

pub fn run(arguments: &ProbeArguments) -> Result<Exit, Failure> {
    let findings = findings(arguments);
    if arguments.json {
        let object: Map<String, Value> =
            findings.iter().map(|(name, value)| (name.replace(' ', "_"), json!(value))).collect();
        console::say(format_args!("{}", Value::Object(object)));
        return Ok(Exit::Done);
    }
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    for (name, value) in findings {
        table.add_row([name.to_owned(), value]);
    }
    console::say(format_args!("{table}"));
    Ok(Exit::Done)
}

fn findings(arguments: &ProbeArguments) -> Vec<(&'static str, String)> {
    let kernel = rustix::system::uname();
    let cores = match cpu::allowed_cores() {
        Ok(cores) => format!("{} usable: {}", cores.len(), list(&cores)),
        Err(error) => error.to_string(),
    };
    let mut findings = vec![
        ("kernel", format!("{} {}", kernel.sysname().to_string_lossy(), kernel.release().to_string_lossy())),
        ("user", if rustix::process::geteuid().is_root() { "root" } else { "unprivileged" }.to_owned()),
        ("cores", cores),
        ("numa nodes", numa_nodes().to_string()),
        ("memory", memory()),
        ("locked memory allowed", locked_memory()),
        ("TCP congestion control", congestion()),
    ];
    findings.extend(io_uring());
    findings.push(("slot memory", slots()));
    findings.push((
        "dirty tracking (embedded guest)",
        match try_tracking() {
            Ok(()) => "yes: userfaultfd WP_ASYNC and PAGEMAP_SCAN".to_owned(),
            Err(error) => format!("no: {error}"),
        },
    ));
    findings.extend(xen(arguments));
    findings
}

fn list(items: &[impl Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn numa_nodes() -> usize {
    let nodes = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let is_node = |name: &str| name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok());
    nodes.filter(|entry| entry.file_name().to_str().is_some_and(is_node)).count().max(1)
}

fn memory() -> String {
    let of = |name| memory_info::line(name).unwrap_or_else(|| "not told".to_owned());
    format!(
        "{} available; huge pages: {} free of {}, each {}",
        of("MemAvailable"),
        of("HugePages_Free"),
        of("HugePages_Total"),
        of("Hugepagesize")
    )
}

fn locked_memory() -> String {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        None => "without limit".to_owned(),
        Some(_) if rustix::process::geteuid().is_root() => "without limit (root)".to_owned(),
        Some(bytes) => format!("{} KiB; more: ulimit -l", bytes / 1024),
    }
}

fn io_uring() -> Vec<(&'static str, String)> {
    let opcodes = match uring::probe_opcodes() {
        Ok(opcodes) => opcodes,
        Err(error) => {
            return vec![(
                "io_uring",
                format!("no: {error}; is it disabled (sysctl kernel.io_uring_disabled, seccomp)?"),
            )];
        }
    };
    let has = |there: bool, since: &str| if there { "yes".to_owned() } else { format!("no (Linux {since})") };
    vec![
        ("io_uring", format!("SEND {}, SENDMSG {}", has(opcodes.send, "5.6"), has(opcodes.sendmsg, "5.3"))),
        (
            "zero-copy sends",
            format!("SEND_ZC {}, SENDMSG_ZC {}", has(opcodes.send_zc, "6.0"), has(opcodes.sendmsg_zc, "6.1")),
        ),
    ]
}

/// The system's. That bbr paces by itself was measured (docs/data-path.md).
fn congestion() -> String {
    match std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control") {
        Ok(name) if name.trim().starts_with("bbr") => {
            format!(
                "{}, which paces by timers and costs the sender much CPU time; --congestion cubic does not",
                name.trim()
            )
        }
        Ok(name) => name.trim().to_owned(),
        Err(error) => format!("not told: {error}"),
    }
}

fn slots() -> String {
    match SlotMemory::new(8 << 20) {
        Ok(memory) => memory.backing().to_string(),
        Err(error) => error.to_string(),
    }
}

fn xen(arguments: &ProbeArguments) -> Vec<(&'static str, String)> {
    let there = |path: &&str| Path::new(path).exists();
    if !["/proc/xen", "/dev/xen"].iter().any(there) && arguments.domain.is_none() {
        return vec![("xen", "no: this is not a Xen host; try `pagecast demo`".to_owned())];
    }
    xen::probe::findings(arguments.domain, arguments.domctl_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_version_is_decimal_or_hexadecimal() {
        assert_eq!(interface_version("0x17"), Ok(0x17));
        assert_eq!(interface_version("23"), Ok(23));
        assert!(interface_version("17h").is_err() && interface_version("0x").is_err());
    }
}
