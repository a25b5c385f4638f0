//! Tests of the configuration.

use super::*;

const CORES: [usize; 4] = [0, 1, 2, 3];

/// Reads a file of this text, and these variables.
fn read(file: &str, variables: &[(&str, &str)]) -> Result<Options, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pagecast.toml");
    std::fs::write(&path, file).unwrap();
    let variables = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
    Options::read(variables, &path, &CORES).map_err(|error| error.to_string())
}

#[test]
fn every_key_is_taken_from_the_file_and_variables_win() {
    let file = r#"
        policy = "xen"
        downtime_budget = "60ms"
        bandwidth = "2.5Gbit"
        deadline = "5min"
        on_no_convergence = "abort"
        linger = "0%"
        sample_share = "5 %"
        pin = "map=0,scan=1,send=2"
        slots = 8
        send = "copy"
        windows = "64MiB"
        report = "/var/log/{domid}.json"
        summary = "/var/log/{domid}.txt"
        stock_helper = "/opt/helper"
    "#;
    let options = read(file, &[]).unwrap();
    let settings = &options.settings;
    assert_eq!(settings.policy, PolicyKind::Xen);
    assert_eq!(settings.downtime_budget, Duration::from_millis(60));
    assert_eq!(settings.sample_interval, Duration::from_millis(20), "a third of the budget");
    assert_eq!(settings.bandwidth, Some(312_500_000));
    assert_eq!(settings.max_time, Duration::from_secs(300));
    assert_eq!(settings.on_no_convergence, OnNoConvergence::Abort);
    assert_eq!(settings.pins, Pins { map: vec![0], scan: 1, send: vec![2] });
    assert_eq!((settings.slots, settings.send, settings.lanes), (8, SendMode::Copy, 1));
    assert_eq!((settings.linger, settings.sample_share, options.window_bytes), (0.0, Some(0.05), 64 << 20));
    let path = |template: Option<PathTemplate>| template.unwrap().fill(3, std::time::UNIX_EPOCH);
    assert_eq!(path(options.report), Path::new("/var/log/3.json"));
    assert_eq!(path(options.summary), Path::new("/var/log/3.txt"));
    assert_eq!(options.stock_helper.as_deref(), Some(Path::new("/opt/helper")));

    let variables = [
        ("PAGECAST_POLICY", "xen-skip"),
        ("PAGECAST_DOWNTIME_BUDGET", "1s"),
        ("PAGECAST_BANDWIDTH", "none"),
        ("PAGECAST_DEADLINE", "1h"),
        ("PAGECAST_ON_NO_CONVERGENCE", "throttle"),
        ("PAGECAST_LINGER", "12.5%"),
        ("PAGECAST_SAMPLE_SHARE", "1%"),
        ("PAGECAST_PIN", "scan=3"),
        ("PAGECAST_SLOTS", "32"),
        ("PAGECAST_SEND", "staged"),
        ("PAGECAST_WINDOWS", "2G"),
        ("PAGECAST_REPORT", "none"),
        ("PAGECAST_SUMMARY", "none"),
        ("PAGECAST_STOCK_HELPER", "none"),
        ("PATH", "/usr/bin"),
    ];
    assert_eq!(variables.len(), KEYS.len() + 1, "every key has its variable");
    let options = read(file, &variables).unwrap();
    let settings = &options.settings;
    assert_eq!((settings.policy, settings.bandwidth), (PolicyKind::XenSkip, None));
    assert_eq!(settings.downtime_budget, Duration::from_secs(1));
    assert_eq!(settings.sample_interval, Duration::from_millis(50), "as long as it gets");
    assert_eq!(settings.max_time, Duration::from_secs(3600));
    assert_eq!(settings.on_no_convergence, OnNoConvergence::Throttle);
    assert_eq!(settings.pins, Pins { scan: 3, ..Pins::among(&CORES, 1) });
    assert_eq!((settings.slots, settings.send), (32, SendMode::Staged));
    assert_eq!((settings.linger, settings.sample_share, options.window_bytes), (0.125, Some(0.01), 2 << 30));
    assert_eq!((options.report, options.summary, options.stock_helper), (None, None, None));
}

#[test]
fn the_policies_of_xen_and_of_the_paper_can_be_chosen() {
    for kind in PolicyKind::ALL {
        let options = read("", &[("PAGECAST_POLICY", kind.name())]).unwrap();
        assert_eq!(options.settings.policy, kind);
    }
}

#[test]
fn what_makes_no_sense_is_one_line_that_says_where_and_what_would_do() {
    for (file, says) in [
        ("polcy = \"ar\"", ["pagecast.toml: polcy", "no such setting", "policy"]),
        ("policy = \"best\"", ["pagecast.toml: policy = \"best\"", "no policy", "xen-skip"]),
        ("downtime_budget = 300", ["downtime_budget = \"300\"", "unit of time", "300ms"]),
        ("downtime_budget = \"10us\"", ["downtime_budget = \"10us\"", "1ms", "at least"]),
        ("bandwidth = \"10\"", ["bandwidth = \"10\"", "unit of rate", "2.5Gbit"]),
        ("deadline = \"0s\"", ["deadline = \"0s\"", "1ms", "at least"]),
        ("on_no_convergence = \"x\"", ["on_no_convergence = \"x\"", "stop", "throttle"]),
        ("linger = 2", ["linger = \"2\"", "100%", "example 25%"]),
        ("sample_share = 2", ["sample_share = \"2\"", "50%", "example 2%"]),
        ("sample_share = \"51%\"", ["sample_share = \"51%\"", "50%", "example 2%"]),
        ("sample_share = \"NaN%\"", ["sample_share = \"NaN%\"", "50%", "example 2%"]),
        ("pin = \"map=9\"", ["pin = \"map=9\"", "core 9", "[0, 1, 2, 3]"]),
        ("slots = 3", ["slots = \"3\"", "4", "4096"]),
        ("send = \"fast\"", ["send = \"fast\"", "direct", "auto"]),
        ("windows = \"1MiB\"", ["windows = \"1MiB\"", "2MiB", "at least"]),
        ("report = \"a.json\"", ["report = \"a.json\"", "begins with /", "none"]),
        ("summary = \"/{host}\"", ["summary = \"/{host}\"", "{domid}", "{time}"]),
        ("stock_helper = \"helper\"", ["stock_helper = \"helper\"", "begins with /", "none"]),
        ("slots = [1]", ["pagecast.toml: slots", "array", "number"]),
        ("[save]\nslots = 8", ["pagecast.toml: save", "no such setting", "slots"]),
        ("slots = 8\n\nslots = 9", ["pagecast.toml, line 3", "dup", "key"]),
        ("slots = ", ["pagecast.toml, line 1", "", ""]),
    ] {
        let error = read(file, &[]).expect_err(file);
        assert!(!error.contains('\n'), "{file}: {error}");
        for part in says {
            assert!(error.contains(part), "{file}: {error}");
        }
    }
}

#[test]
fn variables_are_as_strict_as_the_file() {
    for (name, value, says) in [
        ("PAGECAST_POLCY", "ar", "PAGECAST_POLCY: there is no such setting"),
        ("PAGECAST_policy", "ar", "PAGECAST_policy: there is no such setting"),
        ("PAGECAST_SLOTS", "many", "PAGECAST_SLOTS = \"many\": write a number from 4 to 4096"),
        ("PAGECAST_BANDWIDTH", "", "PAGECAST_BANDWIDTH = \"\""),
        ("PAGECAST_CONFIG", "/nonexistent.toml", "cannot read /nonexistent.toml"),
    ] {
        let error = read("", &[(name, value)]).expect_err(name);
        assert!(error.contains(says), "{name}: {error}");
    }
}

#[test]
fn a_file_that_nobody_named_need_not_be_there_and_must_not_be_endless() {
    let nowhere = Path::new("/nonexistent.toml");
    let options = Options::read(vec![], nowhere, &CORES).unwrap();
    assert_eq!((options.settings.policy, options.settings.lanes), (PolicyKind::Ar, 1));
    let error = read(&"#".repeat(MAX_FILE_BYTES as usize + 1), &[]).unwrap_err();
    assert!(error.contains("64 KiB"), "{error}");
}

#[test]
fn another_file_can_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.toml");
    std::fs::write(&path, "slots = 5").unwrap();
    let options = read("slots = 6", &[("PAGECAST_CONFIG", path.to_str().unwrap())]).unwrap();
    assert_eq!(options.settings.slots, 5);
}
