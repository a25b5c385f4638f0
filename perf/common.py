"""What the instruments in perf/ have in common: the machine, its noise, medians, ratios, tables, JSON files.

Each instrument is a script beside this file and imports from here. An instrument warms up, measures by turns inside
`Noise.around()`, gives medians with ranges and ratios with intervals, and ends with what `Noise.verdict()` says.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True

ROOT = Path(__file__).resolve().parent.parent
NAME = f"perf/{Path(sys.argv[0]).name}"
# Rounds of the spin loop: some tens of milliseconds, long enough to meet whoever else wants the core.
SPIN_ROUNDS = 400_000
# A look at whether the machine is at rest.
SETTLE_S = 0.05
# The share of CPU time that the hypervisor may take away before nothing can be concluded.
STEAL_LIMIT = 0.02
# What intervals aim to cover; with fewer than six pairs it cannot be had, and they say what they reach.
CONFIDENCE = 0.95


def fail(message):
    """Ends the instrument with one line."""
    sys.exit(f"{NAME}: {message}")


def need(program, package):
    """Where a program is; ends with how to get it where there is none."""
    found = shutil.which(program)
    if not found:
        fail(f"{program} is missing; install it (Debian: apt-get install {package})")
    return found


def end_on_signals():
    """Has SIGTERM and SIGHUP unwind like Ctrl-C does, so that whatever was set up is taken down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def build(target=ROOT / "target", flags=None):
    """Builds pagecast and says where the program is; a target directory of its own where flags differ."""
    environment = dict(os.environ, CARGO_TARGET_DIR=str(target))
    if flags:
        environment["RUSTFLAGS"] = flags
    done = subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "pagecast"], cwd=ROOT, env=environment)
    if done.returncode != 0:
        fail("pagecast does not build; `cargo build --release` says why")
    return Path(target) / "release/pagecast"


def program_at(path):
    """A program that the caller named, or else pagecast, built from this tree."""
    if path is None:
        return build()
    if not os.access(path, os.X_OK) or Path(path).is_dir():
        fail(f"{path} is no program; build it there first (cargo build --release)")
    return Path(path).absolute()


def report_of(command):
    """Runs a command that migrates with --json and gives its report."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    except OSError as error:
        fail(f"cannot run {command[0]}: {error.strerror}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        fail(f"{' '.join(map(str, command))} ended with {done.returncode}: {lines[-1]}")
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    reports = [line for line in lines if line.get("event") == "report"]
    if len(reports) != 1:
        fail(f"{' '.join(map(str, command))} gave {len(reports)} reports; exactly one --policy and --json are needed")
    return reports[0]


# -- the machine ------------------------------------------------------------------------------------------------------


def _word(path, otherwise):
    """What a file of one line says."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return otherwise


def _cpuinfo(key):
    """What /proc/cpuinfo says of the first core."""
    lines = (line.partition(":") for line in _word("/proc/cpuinfo", "").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "unknown")


def _chosen(path):
    """The word in brackets of a file such as transparent_hugepage/enabled."""
    return next((word[1:-1] for word in _word(path, "").split() if word.startswith("[")), "unknown")


def _meminfo(key):
    """A figure of /proc/meminfo: KiB, or pages for the pool."""
    lines = (line.split() for line in _word("/proc/meminfo", "").splitlines())
    return next((int(words[1]) for words in lines if words[0] == f"{key}:"), 0)


def _revision():
    """The commit that was built, with a mark where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine():
    """What the figures were measured on, for the JSON file."""
    system = Path("/sys/devices/system")
    weaknesses = sorted((system / "cpu/vulnerabilities").glob("*"))
    return {
        "cpu": _cpuinfo("model name"),
        "microcode": _cpuinfo("microcode"),
        "virtual_machine": "hypervisor" in _cpuinfo("flags").split(),
        "cores_online": os.cpu_count(),
        "cores_used": sorted(os.sched_getaffinity(0)),
        "threads_share_cores": _word(system / "cpu/smt/active", "unknown") == "1",
        "numa_nodes": len(list((system / "node").glob("node[0-9]*"))),
        "memory_bytes": _meminfo("MemTotal") * 1024,
        "kernel": platform.release(),
        "kernel_options": _word("/proc/cmdline", "unknown"),
        "clocksource": _word(system / "clocksource/clocksource0/current_clocksource", "unknown"),
        "governor": _word(system / "cpu/cpu0/cpufreq/scaling_governor", "none: the kernel does not set frequencies"),
        "boost": _word(system / "cpu/cpufreq/boost", "unknown"),
        "huge_pages": {
            "pool_pages": _meminfo("HugePages_Total"),
            "pool_pages_free": _meminfo("HugePages_Free"),
            "page_bytes": _meminfo("Hugepagesize") * 1024,
            "transparent": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            "transparent_defrag": _chosen("/sys/kernel/mm/transparent_hugepage/defrag"),
        },
        "congestion_control": _word("/proc/sys/net/ipv4/tcp_congestion_control", "unknown"),
        "mitigations": {path.name: _word(path, "unknown") for path in weaknesses},
        "revision": _revision(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_line(described):
    """The machine in one line, for people."""
    huge = described["huge_pages"]
    mitigated = sum(state.startswith("Mitigation") for state in described["mitigations"].values())
    return (
        f"{described['cpu']}, cores {','.join(map(str, described['cores_used']))} of {described['cores_online']}"
        f"{' (virtual)' if described['virtual_machine'] else ''}, Linux {described['kernel']}, "
        f"governor {described['governor'].split(':')[0]}, huge pages {huge['pool_pages']} in the pool and transparent "
        f"{huge['transparent']}, {mitigated} mitigations, pagecast {described['revision']}"
    )


# -- its noise --------------------------------------------------------------------------------------------------------


def _processor_ticks():
    """Busy, stolen and all ticks of all cores since the machine was started (guests' time is within user and nice)."""
    user, nice, system, idle, waiting, irq, softirq, stolen = map(int, _word("/proc/stat", "").split()[1:9])
    busy = user + nice + system + irq + softirq
    return busy, stolen, busy + stolen + idle + waiting


def _spin():
    """Wall-clock and CPU seconds of a fixed loop."""
    wall, used, total = time.perf_counter(), time.process_time(), 0
    for number in range(SPIN_ROUNDS):
        total += number
    return time.perf_counter() - wall, time.process_time() - used


def _settle():
    """Waits until nothing goes on, a second at most.

    The kernel gives back the memory of a guest that has ended, and what a ring held of it, behind the guest's end: work of
    our own that would look like somebody else's.
    """
    for _ in range(int(1 / SETTLE_S)):
        before = _processor_ticks()
        time.sleep(SETTLE_S)
        busy, _, total = (now - then for now, then in zip(_processor_ticks(), before))
        if busy <= 1 or busy < 0.05 * total:
            return


class Noise:
    """Whether the machine stood still enough while something was measured.

    `around()` times a fixed spin loop before and after each run. The machine is too noisy when the slower quarter of
    the loops took more than `limit` longer than the fastest one, when others used more than `limit` of all cores while
    the loops ran, or when the hypervisor kept back more than 2 % of the CPU time.
    """

    def __init__(self, limit=0.10):
        self.limit = limit
        self.spins_s = []
        self.loads = []
        self._started = _processor_ticks()
        self._others_ticks = 0.0
        self._loop_ticks = 0
        _spin()  # the first one is cold

    @contextlib.contextmanager
    def around(self):
        """Around each run that counts."""
        self._time()
        yield
        self._time()

    def _time(self):
        """One look at how fast the machine is and what else goes on."""
        _settle()
        before = _processor_ticks()
        times = [_spin() for _ in range(3)]  # three: the ticks of /proc/stat are 10 ms
        after = _processor_ticks()
        self.spins_s.append(min(wall for wall, _ in times))
        self.loads.append(os.getloadavg()[0])
        own_ticks = sum(used for _, used in times) * os.sysconf("SC_CLK_TCK")
        self._others_ticks += after[0] - before[0] - own_ticks
        self._loop_ticks += after[2] - before[2]

    def figures(self):
        """For the JSON file."""
        slow, others, stolen = self._measures()
        return {
            "limit": self.limit,
            "steal_limit": STEAL_LIMIT,
            "spins_s": self.spins_s,
            "slow_quarter_over_fastest": slow,
            "cores_used_by_others": others,
            "stolen": stolen,
            "load_average_highest": max(self.loads, default=0.0),
            "quiet": not self.reasons(),
        }

    def reasons(self):
        """Why nothing should be concluded, in words; nothing where the machine was quiet enough."""
        if not self.spins_s:
            return ["nothing was measured"]
        slow, others, stolen = self._measures()
        found = []
        if slow > self.limit:
            found.append(f"a quarter of the spin loops took {slow:.0%} or more longer than the fastest")
        if others > self.limit:
            found.append(f"others used {others:.0%} of all cores between the runs")
        if stolen > STEAL_LIMIT:
            found.append(f"the hypervisor kept back {stolen:.1%} of the CPU time")
        return found

    def _measures(self):
        """How much longer the slower quarter of the loops took, what others used of the cores, what was stolen."""
        if not self.spins_s:
            return 0.0, 0.0, 0.0
        slow = sorted(self.spins_s)[math.ceil(0.75 * len(self.spins_s)) - 1] / min(self.spins_s) - 1
        others = max(0.0, self._others_ticks / self._loop_ticks) if self._loop_ticks else 0.0
        _, stolen, total = (now - then for now, then in zip(_processor_ticks(), self._started))
        return slow, others, stolen / total if total else 0.0

    def verdict(self):
        """One line: quiet enough, or too noisy to conclude and why."""
        found = self.reasons()
        if found:
            return f"TOO NOISY TO CONCLUDE (limit {self.limit:.0%}, steal {STEAL_LIMIT:.0%}): " + "; ".join(found)
        return f"quiet enough: spin loops and others within {self.limit:.0%}, steal within {STEAL_LIMIT:.0%}"


# -- figures ----------------------------------------------------------------------------------------------------------


def spread(values, digits=2):
    """Median and range, for a table."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio_interval(above, below):
    """The ratio of two things measured by turns: the median of the runs' ratios, with an interval for it.

    The interval is between order statistics (no shape of the noise is assumed): the narrowest that covers the true
    median with 95 %, or all of the range where there are fewer than six pairs. `coverage` is what it really reaches.
    """
    if len(above) != len(below):
        raise ValueError(f"{len(above)} runs cannot be paired with {len(below)}")
    ratios = [top / bottom for top, bottom in zip(above, below) if bottom > 0]
    if not ratios:
        return {"median": None, "low": None, "high": None, "coverage": 0.0, "ratios": []}
    count, ordered = len(ratios), sorted(ratios)
    outside = 2 * 0.5**count
    cut = 0
    while cut + 1 < (count + 1) // 2:
        more = outside + 2 * math.comb(count, cut + 1) * 0.5**count
        if 1 - more < CONFIDENCE:
            break
        outside, cut = more, cut + 1
    return {
        "median": statistics.median(ratios),
        "low": ordered[cut],
        "high": ordered[count - 1 - cut],
        "coverage": max(0.0, 1 - outside),
        "ratios": ratios,
    }


def interval(ratio, digits=2):
    """A ratio with its interval, for a table."""
    if ratio["median"] is None:
        return "-"
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f}-{ratio['high']:.{digits}f})"


def table(headings, rows):
    """Rows of texts as lines under headings: the first column to the left, the others to the right."""
    cells = [list(map(str, row)) for row in [headings, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("   ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def write_json(path, result):
    """Writes all figures to a file, where one was asked for."""
    if not path:
        return
    try:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; name another file with --json")
