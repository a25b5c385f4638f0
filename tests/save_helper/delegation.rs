//! What is not pagecast's to do goes to the stock helper as if pagecast had never been there, or is refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::fake_libxl::{ERROR, Helper, INFO, Said, SigTerm, WARN};

pub const TESTS: &[(&str, fn())] = &[
    ("a_restore_reaches_the_stock_helper_as_if_pagecast_were_not_there", a_restore_reaches_it),
    (
        "everything_unusual_reaches_the_stock_helper_with_one_line_that_says_why",
        everything_unusual_reaches_it,
    ),
    ("a_stock_helper_that_will_not_do_fails_the_migration_with_the_reason", one_that_will_not_do),
    ("a_bad_configuration_fails_a_save_and_only_warns_a_restore", a_bad_configuration),
    ("without_xen_a_save_fails_and_says_that_this_is_no_dom0", without_xen),
    ("a_person_is_told_that_this_is_for_libxl", a_person_is_told),
];

pub const RESTORE: &str = "--restore-domain STREAM 20 3 1 0 2 0 768 0";
pub const SAVE: &str = "--save-domain STREAM 11 1 1 136 0";

pub fn pagecast() -> PathBuf {
    env!("CARGO_BIN_EXE_pagecast").into()
}

/// A folder with a stock helper that tells on its standard output how it was run and what it reads.
pub fn stock() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a fresh folder");
    let path = folder.path().join("libxl-save-helper");
    // Not sh: Debian's empties the signal mask that it is started with.
    let script = "#!/bin/bash\n\
        echo arguments: \"$@\"\n\
        (cd /proc/$$/fd && exec stat -c %N *)\n\
        grep -E '^Sig(Blk|Ign)' /proc/self/status\n\
        env | sort\n\
        cat\n";
    put(&path, script);
    (folder, path)
}

fn put(path: &Path, text: &str) {
    fs::write(path, text).expect("a fresh folder");
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("our own file");
}

/// What the stock helper tells when it is run by `program`, which says one line first if it is not the stock helper itself.
/// The inodes of the pipes are replaced by their names.
pub fn told(program: &Path, arguments: &str, environment: &[(&str, &str)], sigterm: SigTerm) -> String {
    let mut helper = Helper::start(program, arguments, environment, sigterm);
    if !program.ends_with("libxl-save-helper") {
        helper.hear_log(INFO, &["leaving this to", "libxl-save-helper, because"]);
    }
    let pipes = helper.pipes();
    helper.write_and_close("what libxl would answer");
    let mut told = helper.rest();
    assert_eq!(helper.exit_code(), Some(0));
    for (inode, name) in pipes.into_iter().zip(["answers", "messages", "stream"]) {
        told = told.replace(&format!("pipe:[{inode}]"), name);
    }
    for line in told.clone().lines().filter_map(|line| line.strip_prefix("SigIgn:\t")) {
        // Signals 32 and 33 are the C library's own, and posix_spawn leaves them ignored at times.
        let ignored = u64::from_str_radix(line, 16).expect("a signal set") & !(3 << 31);
        told = told.replace(line, &format!("{ignored:016x}"));
    }
    // The number itself depends on what the test program has open.
    let number = helper.stream_fd;
    told.replace(&format!("-domain {number}"), "-domain N").replace(&format!("'{number}' ->"), "'N' ->")
}

/// Whether SIGTERM is in a set that was told.
fn has_sigterm(told: &str, name: &str) -> bool {
    let set = told.lines().find_map(|line| line.strip_prefix(name)).expect("the set is told");
    u64::from_str_radix(set, 16).expect("a signal set") >> (libc::SIGTERM - 1) & 1 == 1
}

fn a_restore_reaches_it() {
    let (_folder, stock) = stock();
    let environment = [("PAGECAST_STOCK_HELPER", stock.to_str().expect("text")), ("ANYTHING", "1 2")];
    for sigterm in [SigTerm::Default, SigTerm::Blocked, SigTerm::Ignored] {
        let without = told(&stock, RESTORE, &environment, sigterm);
        assert!(without.contains("arguments: --restore-domain N 20 3 1 0 2 0 768 0"), "{without}");
        for line in ["'0' -> 'answers'\n", "'1' -> 'messages'\n", "'N' -> 'stream'\n"] {
            assert!(without.contains(line), "{line:?} in {without}");
        }
        assert!(without.contains("ANYTHING=1 2\n") && without.ends_with("what libxl would answer"));
        // Whoever runs the tests may ignore others, as nohup does.
        let blocked = has_sigterm(&without, "SigBlk:\t");
        let ignored = has_sigterm(&without, "SigIgn:\t");
        assert_eq!(blocked, sigterm == SigTerm::Blocked, "{without}");
        assert_eq!(ignored, sigterm == SigTerm::Ignored, "{without}");
        assert_eq!(told(&pagecast(), RESTORE, &environment, sigterm), without, "{sigterm:?}");
    }
}

fn everything_unusual_reaches_it() {
    let (folder, stock) = stock();
    let file = folder.path().join("pagecast.toml");
    fs::write(&file, format!("stock_helper = {stock:?}")).expect("our own folder");
    let environment = [("PAGECAST_CONFIG", file.to_str().expect("text"))];
    for (arguments, why) in [
        ("--save-domain STREAM 11 1 1 136 1", "it saves for Remus"),
        ("--save-domain STREAM 11 1 1 136 2", "it saves for COLO"),
        ("--save-domain STREAM 11 1 3 136 0", "it saves with --debug"),
        ("--save-domain STREAM 11 1 1 136", "has 5 arguments"),
        ("--save-domain STREAM 11 one 1 136 0", "makes no sense"),
        ("--restore-domain", "it restores a domain"),
    ] {
        let mut helper = Helper::start(&pagecast(), arguments, &environment, SigTerm::Default);
        helper.hear_log(INFO, &[&format!("leaving this to {}, because", stock.display()), why]);
        helper.write_and_close("");
        let first = format!("arguments: {}", arguments.replace("STREAM", &helper.stream_fd.to_string()));
        let rest = helper.rest();
        assert_eq!(rest.lines().next(), Some(first.as_str()), "{rest}");
        assert_eq!(helper.exit_code(), Some(0));
    }
}

fn one_that_will_not_do() {
    let folder = tempfile::tempdir().expect("a fresh folder");
    let garbage = folder.path().join("libxl-save-helper");
    put(&garbage, "\0");
    let own = pagecast();
    let garbage = garbage.to_str().expect("text");
    for (path, errno, says) in [
        ("/nonexistent/helper", libc::ENOENT, "stock_helper is /nonexistent/helper"),
        (own.to_str().expect("text"), libc::ENOENT, "pagecast itself"),
        (garbage, libc::ENOEXEC, "cannot run"),
    ] {
        let environment = [("PAGECAST_STOCK_HELPER", path)];
        let mut helper = Helper::start(&pagecast(), RESTORE, &environment, SigTerm::Default);
        if errno == libc::ENOEXEC {
            helper.hear_log(INFO, &["leaving this to", garbage]);
        }
        helper.hear_log(ERROR, &[says, "because it restores a domain"]);
        helper.expect_complete(-1, errno);
    }
}

fn a_bad_configuration() {
    let (_folder, stock) = stock();
    let stock = stock.to_str().expect("text");
    let environment = [("PAGECAST_STOCK_HELPER", stock), ("PAGECAST_BANDWIDTH", "fast")];
    let says = ["PAGECAST_BANDWIDTH = \"fast\"", "write for example"];
    let mut helper = Helper::start(&pagecast(), SAVE, &environment, SigTerm::Default);
    helper.hear_log(ERROR, &says);
    helper.expect_complete(-1, libc::EINVAL);

    let mut helper = Helper::start(&pagecast(), RESTORE, &environment, SigTerm::Default);
    helper.hear_log(WARN, &says);
    helper.hear_log(INFO, &["leaving this to", stock]);
    helper.write_and_close("");
    assert!(helper.rest().starts_with("arguments: --restore-domain"));
    assert_eq!(helper.exit_code(), Some(0));
}

fn without_xen() {
    if ["/dev/xen/privcmd", "/proc/xen/privcmd"].iter().any(|path| Path::new(path).exists()) {
        eprintln!("SKIPPED: without_xen: this is a Xen dom0");
        return;
    }
    let mut helper = Helper::start(&pagecast(), SAVE, &[], SigTerm::Default);
    helper.hear_log(ERROR, &["domain 1 is not saved", "no Xen dom0", "pagecast probe"]);
    helper.expect_complete(-1, libc::ENODEV);
    let closed = "--save-domain 999 11 1 1 136 0";
    let mut helper = Helper::start(&pagecast(), closed, &[], SigTerm::Default);
    helper.hear_log(ERROR, &["the stream's descriptor 999"]);
    assert_eq!(helper.hear(), Said::Complete { retval: -1, errno: libc::EBADF });
}

fn a_person_is_told() {
    // Either end of a pseudo-terminal is a terminal.
    let terminal = fs::File::options().read(true).write(true).open("/dev/ptmx").expect("a pseudo-terminal");
    let output = std::process::Command::new(pagecast())
        .args(SAVE.replace("STREAM", "15").split(' '))
        .stdin(terminal)
        .output()
        .expect("the program can be started");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("LIBXL_SAVE_HELPER"));
}
