//! Xen's own verifier reads what the writer writes. `scripts/fetch-verify-stream` fetches it; without it, or without
//! python3, the test says so and is skipped.

use pagecast::page::{PAGE_SIZE, Pfn};
use pagecast::stream::{self, ArenaContext, DomainHeader, GuestType, HEADER_ROOM, PageKind, PageRecord};
use pagecast::stream::{RecordType, TscInfo};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const DOMAIN: DomainHeader = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };

/// The unpacked package, if it is there: where the environment says, or where the script puts it.
fn package_root() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let root = set("PAGECAST_VERIFY_STREAM").unwrap_or_else(|| {
        let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/verify-stream");
        set("PAGECAST_CACHE").unwrap_or_else(default).join("root")
    });
    root.join("usr/lib/xen-4.17/bin/verify-stream-v2").exists().then_some(root)
}

/// Says why a test does not run; past the harness, which hides what a passing test prints.
fn skip(why: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {why}").expect("stderr can be written to");
}

fn verify(root: &Path, stream: &[u8], name: &str) -> Output {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, stream).expect("the stream can be written to a file");
    let xen = root.join("usr/lib/xen-4.17");
    Command::new("python3")
        .env("PYTHONPATH", xen.join("lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(xen.join("bin/verify-stream-v2"))
        .args(["-v", "-f", "libxc", "-i"])
        .arg(&file)
        .output()
        .expect("python3 can be started")
}

/// A stream with a record of every kind that the writer knows.
fn whole_stream() -> Vec<u8> {
    let mut stream = stream::headers(&DOMAIN).to_vec();
    stream.extend(stream::record(RecordType::X86_CPUID_POLICY, &[0; 48]));
    stream.extend(stream::record(RecordType::X86_MSR_POLICY, &[0; 32]));
    stream.extend(stream::record(RecordType::STATIC_DATA_END, &[]));

    let mut slot = vec![0; HEADER_ROOM + 8 * PAGE_SIZE];
    let mut pages = PageRecord::new(&mut slot);
    for (pfn, kind) in [(1, PageKind::Alloc), (7, PageKind::Xtab), (9, PageKind::Broken)] {
        pages.next_page().fill(0x5a);
        pages.commit(Pfn(pfn - 1));
        pages.push_empty(Pfn(pfn), kind);
    }
    let range = pages.finish();
    stream.extend(&slot[range]);

    let mut pages = PageRecord::new(&mut slot);
    while !pages.is_full() {
        pages.push_external(Pfn(0xf_0000 + pages.entries() as u64));
    }
    let data_len = pages.data_pages() * PAGE_SIZE;
    let range = pages.finish();
    stream.extend(&slot[range]);
    stream.resize(stream.len() + data_len, 0xa5);

    stream.extend(stream::tsc_info(&TscInfo { mode: 0, khz: 2_400_000, nsec: 1, incarnation: 1 }));
    let context = ArenaContext { nr_pages: 3, digests: Some(vec![1, 2, 3]) };
    stream.extend(stream::record(RecordType::HVM_CONTEXT, &context.encode(&DOMAIN)));
    stream.extend(stream::hvm_params(&[(1, 0xfeff9), (17, 0xfeffa)]));
    stream.extend(stream::end());
    stream
}

#[test]
fn xens_verifier_accepts_our_streams_and_finds_faults_in_broken_ones() {
    let Some(root) = package_root() else {
        return skip("verify-stream-v2 is not here; run scripts/fetch-verify-stream");
    };
    if Command::new("python3").arg("--version").output().is_err() {
        return skip("python3 is not here");
    }
    let stream = whole_stream();
    let good = verify(&root, &stream, "good.stream");
    assert!(good.status.success(), "{good:?}");
    let report = String::from_utf8_lossy(&good.stdout);
    assert!(report.contains("Domain Header: x86 HVM from Xen 4.17"), "{report}");
    assert!(report.contains("Squashed 2 Page Data records together"), "{report}");

    let smallest = [stream::stream_head(&DOMAIN), stream::end().to_vec()].concat();
    assert!(verify(&root, &smallest, "smallest.stream").status.success());

    // 1 is the verifier's verdict on a bad stream; 2 would be a fault of its own.
    let cut = &stream[..stream.len() - 1];
    assert_eq!(verify(&root, cut, "cut.stream").status.code(), Some(1));
    let mut damaged = stream;
    let version = 15;
    damaged[version] = 9;
    assert_eq!(verify(&root, &damaged, "damaged.stream").status.code(), Some(1));
}
