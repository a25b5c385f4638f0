//! Bad input gets one line that says what to do, and an exit code that says whose fault it was.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::harness::{Folder, run, start_receiver};

/// A greeting as a source sends it.
fn greet(connection: &mut TcpStream, nr_pages: u64, lanes: u16) {
    let migration = "0".repeat(32);
    let hello = format!(
        r#"{{"message":"hello","version":1,"migration":"{migration}","nr_pages":{nr_pages},"lanes":{lanes},"lane":0}}"#
    );
    let frame = [&b"PCS1"[..], &(hello.len() as u32).to_le_bytes(), hello.as_bytes()].concat();
    connection.write_all(&frame).expect("it reads");
}

/// Asserts that a command line is refused with exit code `code` and one line that contains `says`.
fn refused(arguments: &[&str], code: i32, says: &str) {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(said.contains(says), "{arguments:?}: {said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{arguments:?}: {said}");
    assert!(said.starts_with("pagecast: "), "{arguments:?}: {said}");
}

#[test]
fn bad_options_are_refused_in_one_line() {
    for (option, value, says) in [
        ("--workload", "ide", "idle, kv"),
        ("--policy", "lru", "xen-skip"),
        ("--memory", "lots", "begin with a number"),
        ("--memory", "4097", "whole number of 4 KiB pages"),
        ("--memory", "1MiB", "4MiB at least"),
        ("--seed", "-1", "--seed"),
        ("--rate", "fast", "--rate"),
        ("--zero-share", "91", "0..=90"),
        ("--bandwidth", "10", "2.5Gbit"),
        ("--bandwidth", "1bit", "two pages a second"),
        ("--budget", "300", "300ms"),
        ("--budget", "0ms", "1ms at least"),
        ("--max-time", "0s", "more than nothing"),
        ("--on-no-convergence", "retry", "stop, abort or throttle"),
        ("--linger", "25", "for example 25%"),
        ("--lanes", "0", "1..=64"),
        ("--send", "fast", "direct, staged, staged-copy, copy or auto"),
        ("--congestion", "none-such", "tcp_available_congestion_control"),
        ("--slot-pages", "tiny", "auto, small or huge"),
        ("--pin", "map", "STAGE=CORES"),
        ("--pin", "map=4095", "not among"),
        ("--sample", "0ms", "1ms to 10s"),
        ("--slots", "1", "4..=4096"),
        ("--warm-up", "soon", "begin with a number"),
        ("--run-on", "1", "300ms"),
        ("--nonsense", "1", "--nonsense"),
    ] {
        refused(&["demo", &format!("{option}={value}")], 2, says);
    }
    refused(&["demo", "--compare", "--policy=ar"], 2, "cannot be used with");
    refused(&["demo", "--capture=x", "--lanes=2"], 2, "leave out --lanes");
    refused(&["mirror", "--pid=1", "--capture=x", "--lanes=2"], 2, "leave out --lanes");
    refused(&["fly"], 2, "fly");
    refused(&["guest"], 2, "--socket");
    refused(&["guest", "--socket=x", "--incoming=77"], 2, "pagecast receive");
    refused(&["guest", "--socket=x", "--memory=1048576T"], 2, "has to spare");
    refused(&["take-back", "--socket=x"], 2, "--destination-is-gone");
    refused(&["send", "--socket=x"], 2, "HOST:PORT");
    refused(&["receive", "--socket=x", "--max-memory=all"], 2, "begin with a number");
}

#[test]
fn what_cannot_be_reached_is_named() {
    let folder = Folder::new();
    let path = |name: &str| folder.path(name).to_str().expect("a plain path").to_owned();
    refused(&["send", "--socket", &path("none"), "127.0.0.1:1"], 1, "does not answer");
    refused(&["receive", "--socket", &path("r"), "--listen=nowhere"], 1, "choose another with --listen");
    let capture = ["--capture", &path("none/stream")];
    let says = "choose another file with --capture";
    refused(&[&["receive", "--socket", &path("r"), "--listen=127.0.0.1:0"], &capture[..]].concat(), 1, says);
    refused(&[&["demo", "--warm-up=1h"], &capture[..]].concat(), 1, says);
    refused(&["guest", "--socket", "/nonexistent/folder/socket"], 1, "choose another path with --socket");
}

#[test]
fn a_file_where_the_socket_is_to_be_is_refused_and_left_as_it_is() {
    let folder = Folder::new();
    let file = folder.path("notes");
    std::fs::write(&file, "of some worth").expect("a fresh folder");
    let link = folder.path("link");
    std::os::unix::fs::symlink(&file, &link).expect("a fresh folder");
    for taken in [&file, &link, &folder.0] {
        let path = taken.to_str().expect("a plain path");
        let says = format!(
            "cannot listen on {path}: it exists and is not a socket; choose another path with --socket"
        );
        refused(&["guest", "--memory=4MiB", "--socket", path], 1, &says);
    }
    assert_eq!(std::fs::read_to_string(&link).expect("link and file are there"), "of some worth");
}

#[test]
fn a_receiver_whose_socket_is_another_file_says_so_once_and_tells_the_source() {
    let folder = Folder::new();
    std::fs::write(folder.path("notes"), "of some worth").expect("a fresh folder");
    let (mut receiver, address) = start_receiver(&folder.path("notes"), &[]);
    let mut connection = TcpStream::connect(address).expect("it listens");
    greet(&mut connection, 1024, 1);
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("it exists and is not a socket"));
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("it exists and is not a socket; choose another path with --socket"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert_eq!(std::fs::read_to_string(folder.path("notes")).expect("it is there"), "of some worth");
}

#[test]
fn garbage_sent_to_a_receiver_is_refused_in_one_line_and_the_next_connection_is_heard() {
    let folder = Folder::new();
    let (mut receiver, address) = start_receiver(&folder.path("away"), &["--max-memory=8MiB"]);
    let oversized = [&b"PCS1"[..], &u32::MAX.to_le_bytes()].concat();
    let wrong = [&b"PCS1"[..], &[2, 0, 0, 0], b"{}"].concat();
    let all = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0xff; 64], &oversized, &wrong];
    for garbage in all {
        let mut connection = TcpStream::connect(&address).expect("it listens");
        connection.write_all(garbage).expect("it reads");
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).expect("it answers");
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains("aborted") && answer.contains("not a migration"), "{answer}");
    }
    drop(TcpStream::connect(&address).expect("it listens"));
    let mut connection = TcpStream::connect(&address).expect("it listens");
    greet(&mut connection, u64::MAX, 1);
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), all.len() + 2, "{said}");
    for line in &lines[..all.len()] {
        assert!(line.starts_with("pagecast receive: sent 127.0.0.1:"), "{line}");
        assert!(line.contains("not a migration") && line.contains("pagecast send"), "{line}");
    }
    assert!(
        lines[all.len()].ends_with("away: the other side closed the connection without a word"),
        "{said}"
    );
    assert!(lines[all.len() + 1].contains("raise --max-memory"), "{said}");
}

#[test]
fn a_garbage_stream_behind_a_good_greeting_is_refused_with_record_and_offset() {
    let folder = Folder::new();
    let (mut receiver, address) = start_receiver(&folder.path("away"), &[]);
    let mut connection = TcpStream::connect(address).expect("it listens");
    greet(&mut connection, 1024, 1);
    connection.write_all(&[0x55; 4096]).expect("it reads");
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains("welcome") && answer.contains("aborted"), "{answer}");
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("image header") && said.contains("offset"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
}

#[test]
fn a_guest_larger_than_allowed_is_refused_before_memory_is_taken() {
    let folder = Folder::new();
    let (mut receiver, address) = start_receiver(&folder.path("away"), &["--max-memory=8MiB"]);
    let mut connection = TcpStream::connect(address).expect("it listens");
    greet(&mut connection, u64::MAX, 1);
    let mut answer = Vec::new();
    let _ = connection.read_to_end(&mut answer);
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("raise --max-memory"), "{said}");
    assert!(String::from_utf8_lossy(&answer).contains("raise --max-memory"));
}

#[test]
fn a_source_that_dies_between_its_lanes_does_not_keep_the_receiver() {
    let folder = Folder::new();
    let (mut receiver, address) = start_receiver(&folder.path("away"), &[]);
    let mut connection = TcpStream::connect(address).expect("it listens");
    greet(&mut connection, 1024, 2);
    let mut welcome = [0; 8];
    connection.read_exact(&mut welcome).expect("it answers");
    drop(connection);
    let (code, said) = receiver.end();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("lane 1 never came: the source is gone"), "{said}");
}
