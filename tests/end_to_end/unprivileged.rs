//! A user without rights can run the demonstration.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::harness::{Folder, tracking_or_skip};

/// Any user that is not root and owns nothing.
const NOBODY: u32 = 65534;

#[test]
fn a_user_without_rights_can_migrate_a_guest() {
    let name = "a_user_without_rights_can_migrate_a_guest";
    if !tracking_or_skip(name) {
        return;
    }
    // A copy that everybody may run: the build folder need not be open to others.
    let folder = Folder::new();
    let program = folder.path("pagecast");
    std::fs::copy(env!("CARGO_BIN_EXE_pagecast"), &program).expect("room for a copy");
    let mut command = Command::new(&program);
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&folder.0, mode).expect("our own folder");
    }
    let output = command
        .args(["demo", "--policy=ar", "--memory=32MiB", "--warm-up=300ms", "--run-on=200ms"])
        .stdin(Stdio::null())
        .output()
        .expect("the copy can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("all 8192 pages equal"), "{said}");
}
