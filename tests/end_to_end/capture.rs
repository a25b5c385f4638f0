//! A captured stream is one that Xen's own tools accept.

use std::path::PathBuf;
use std::process::Command;

use crate::harness::{Folder, run, start_receiver, tracking_or_skip};

/// Where scripts/fetch-verify-stream unpacked Xen's tools, if it did.
fn xen_tools() -> Option<PathBuf> {
    let root = std::env::var_os("PAGECAST_VERIFY_STREAM").map(PathBuf::from);
    let cached = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/verify-stream/root");
    root.into_iter().chain([cached]).find(|root| root.join("usr/lib/xen-4.17/bin/verify-stream-v2").exists())
}

#[test]
fn a_captured_stream_takes_the_place_of_what_was_in_the_file_and_only_then() {
    let name = "a_captured_stream_takes_the_place_of_what_was_in_the_file_and_only_then";
    if !tracking_or_skip(name) {
        return;
    }
    let folder = Folder::new();
    let file = folder.path("stream");
    let path = file.to_str().expect("a plain path");
    let before = vec![0x55; 64 << 20];
    std::fs::write(&file, &before).expect("a fresh folder");
    let (receiver, _) = start_receiver(&folder.path("away"), &["--capture", path]);
    drop(receiver);
    assert!(std::fs::read(&file).expect("it is there") == before);
    let quick = ["--policy=ar", "--memory=16MiB", "--warm-up=100ms", "--run-on=100ms"];
    let output = run(&[&["demo", "--capture", path], &quick[..]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let length = std::fs::metadata(&file).expect("it is there").len();
    assert!(length > 0 && length < before.len() as u64, "{length}");
}

#[test]
fn xens_own_checker_accepts_a_captured_migration() {
    let name = "xens_own_checker_accepts_a_captured_migration";
    if !tracking_or_skip(name) {
        return;
    }
    let Some(root) = xen_tools() else {
        eprintln!("SKIPPED: {name}: no verify-stream-v2; scripts/fetch-verify-stream gets it");
        return;
    };
    let folder = Folder::new();
    let file = folder.path("stream");
    for send in ["direct", "staged"] {
        let path = file.to_str().expect("a plain path");
        let output = run(&[
            "demo",
            "--policy",
            "ar",
            "--memory",
            "32MiB",
            "--warm-up",
            "300ms",
            "--run-on",
            "200ms",
            "--send",
            send,
            "--capture",
            path,
        ]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let checked = Command::new("python3")
            .env("PYTHONPATH", root.join("usr/lib/xen-4.17/lib/python"))
            .arg(root.join("usr/lib/xen-4.17/bin/verify-stream-v2"))
            .args(["-v", "-f", "libxc", "-i"])
            .arg(&file)
            .output()
            .expect("python3 is there");
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
}
