"""The ways that `perf/throughput` sends over, and one migration and one iperf3 run over each of them.

A path is two places and an address. A place is the words before a command that make it run there. What is set up here
is taken down when the `with` ends, however it ends.
"""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, fail, need

PORT = 7391
SINK_ADDRESS = "10.94.0.2"
POOL = Path("/proc/sys/vm/nr_hugepages")
# Pages of 2 MiB for the slots of one lane, 16 of 264 KiB each, with room to spare.
POOL_PAGES_A_LANE = 8
PATIENCE_S = 60
# Programs that run another one and write down what it did when it ends.
WRAPPERS = ["perf", "strace"]
# How `slot_memory` of a report reads for what was asked for.
BACKINGS = {"as-is": None, "small": "4 KiB pages", "huge": "transparent huge pages", "hugetlb": "hugetlb pages"}
SLOT_PAGES = {"as-is": "auto", "small": "small", "huge": "huge", "hugetlb": "huge"}


@dataclass
class Route:
    """Where the source is, where the destination is, and how the one calls the other."""

    name: str
    address: str
    source: list = field(default_factory=list)
    destination: list = field(default_factory=list)
    far: bool = False
    # What takes the receiver's place, where one does; then there is one connection and no iperf3.
    stand_in: list = field(default_factory=list)


@contextlib.contextmanager
def loopback():
    """Both ends in this machine's own network."""
    yield Route("loopback", "127.0.0.1")


def _set_up(*command):
    """One step of setting a path up; gives what it says."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        fail(f"{' '.join(command)} said: {said[-1]}; leave this path out with --paths loopback")
    return done.stdout


@contextlib.contextmanager
def _namespaces(purpose):
    """Two network namespaces with a veth pair between them, as (name, link, words to run something there)."""
    ip = need("ip", "iproute2")
    if os.geteuid() != 0:
        fail(f"the path {purpose} needs root, for network namespaces; run it as root or with --paths loopback")
    names = [f"pagecast-{purpose}-{os.getpid()}-{end}" for end in "ab"]
    links = [f"pc{purpose[0]}{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _set_up(ip, "netns", "add", name)
        _set_up(ip, "-n", names[0], "link", "add", links[0], "type", "veth", "peer", "name", links[1],
                "netns", names[1])
        for name, link in zip(names, links):
            _set_up(ip, "-n", name, "link", "set", "lo", "up")
            _set_up(ip, "-n", name, "link", "set", link, "up")
        yield [(name, link, [ip, "netns", "exec", name]) for name, link in zip(names, links)]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def veth():
    """A veth pair between two network namespaces of this run."""
    with _namespaces("veth") as ends:
        for number, (name, link, _) in enumerate(ends, 1):
            _set_up("ip", "-n", name, "address", "add", f"10.93.0.{number}/24", "dev", link)
        yield Route("veth", "10.93.0.2", ends[0][2], ends[1][2])


@contextlib.contextmanager
def sink():
    """A TCP peer that exists nowhere: data is swallowed where a veth would send it, and acknowledged from outside.

    The only way inside one machine on which the kernel really sends zero-copy over TCP: data never come to the veth's
    transmit function, and so never to a receiver, for whom they would be copied.
    """
    clang, bpftool = need("clang", "clang"), need("bpftool", "bpftool")
    if not Path("/usr/include/bpf/bpf_helpers.h").exists():
        fail("bpf/bpf_helpers.h is missing; install it (Debian: apt-get install libbpf-dev)")
    need("tc", "iproute2")
    with contextlib.ExitStack() as stack:
        (here, link, at_here), (_, far_link, at_there) = stack.enter_context(_namespaces("sink"))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagecast-sink-"))
        program, pins = f"{folder}/sink.o", f"{folder}/pins"
        _set_up(clang, "-O2", "-g", "-target", "bpf", f"-I/usr/include/{platform.machine()}-linux-gnu",
                f"-DSINK_PORT={PORT}", "-c", str(ROOT / "perf/sink.bpf.c"), "-o", program)
        os.mkdir(pins)
        _set_up("mount", "-t", "bpf", "bpf", pins)
        stack.callback(subprocess.run, ["umount", pins], check=False)
        _set_up(bpftool, "prog", "load", program, f"{pins}/sink", "type", "classifier", "pinmaps", f"{pins}/maps")
        _set_up("ip", "-n", here, "address", "add", "10.94.0.1/24", "dev", link)
        _set_up("ip", "-n", here, "neigh", "add", SINK_ADDRESS, "lladdr", "02:00:00:00:00:77", "dev", link)
        # The header of a data segment is then 54 bytes, always.
        _set_up(*at_here, "sysctl", "-q", "net.ipv4.tcp_timestamps=0", "net.ipv4.tcp_sack=0")
        _set_up(*at_here, "tc", "qdisc", "add", "dev", link, "clsact")
        _set_up(*at_here, "tc", "filter", "add", "dev", link, "egress", "bpf", "da", "object-pinned", f"{pins}/sink")
        mac = json.loads(_set_up("ip", "-n", here, "-j", "link", "show", link))[0]["address"]
        stand_in = [*at_there, sys.executable, str(ROOT / "perf/sink.py"), f"{pins}/maps/state", far_link, mac,
                    SINK_ADDRESS, str(PORT)]
        yield Route("sink", SINK_ADDRESS, at_here, at_there, stand_in=stand_in)


@contextlib.contextmanager
def remote(host):
    """To another machine, where `perf/throughput --serve` runs."""
    yield Route(f"to {host}", host, far=True)


# -- page backing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pool_of(lanes, backing):
    """Huge pages in the pool for as long as they are needed, where they are asked for."""
    if backing != "hugetlb":
        yield
        return
    before = POOL.read_text()
    try:
        try:
            POOL.write_text(str(int(before) + POOL_PAGES_A_LANE * lanes))
        except OSError as error:
            fail(f"cannot reserve huge pages: {error.strerror}; run it as root or leave hugetlb out of --backings")
        yield
    finally:
        if POOL.read_text() != before:
            POOL.write_text(before)


# -- what is measured over a path -------------------------------------------------------------------------------------


def _children(pid):
    """The processes that a process has started and that still run."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _is_gone(pid):
    """Whether a process has ended, and given its memory back."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _end(process):
    """Ends a process; of one that has another one run for it, such as perf stat, the other, so that it can finish.

    Returns when what they had started is gone too: a received guest's memory takes time to be given back, and that
    would look like somebody else's work.
    """
    wrapped = _children(process.pid) if Path(process.args[0]).name in WRAPPERS else []
    started = [child for pid in [process.pid, *wrapped] for child in _children(pid)]
    for pid in wrapped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not wrapped:
        process.terminate()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    until = time.monotonic() + PATIENCE_S
    while not all(map(_is_gone, started)) and time.monotonic() < until:
        time.sleep(0.005)


@contextlib.contextmanager
def _running(command, words, **options):
    """A process that has said `words`, and the line it said them in; ended with the `with`."""
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, **options)
    impatient = threading.Timer(PATIENCE_S, process.kill)
    impatient.start()
    try:
        while words not in (line := process.stdout.readline()):
            if not line:
                process.wait()
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["nothing"]
                fail(f"{' '.join(map(str, command))} did not start; it said: {said[-1]}")
        impatient.cancel()
        yield process, line
    finally:
        impatient.cancel()
        _end(process)
        process.stdout.close()
        errors.close()


def migrate(route, program, memory, mode, lanes, backing, before=None, options=("--policy=xen",),
            workload=("--workload=idle",)):
    """The report of one migration of a guest whose pages are full of random bytes, idle unless `workload` says otherwise;
    nothing is capped.

    `before` has words to put before the commands that are the source's and the destination's migrator, and `options` are
    more options of the former.
    """
    before = before or {"source": [], "destination": []}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagecast-throughput-"))
        stack.enter_context(pool_of(lanes, backing))
        port = str(PORT)
        if not route.far:  # any free port: a receiver's guest keeps the last one for a moment
            receive = [program, "receive", "--die-with-parent", f"--listen={route.address}:0",
                       f"--socket={folder}/there"]
            receive = route.stand_in or [*route.destination, *before["destination"], *receive]
            _, line = stack.enter_context(_running(receive, "listening"))
            port = line.strip().rpartition(":")[2]
        guest = [program, "guest", "--die-with-parent", *workload, "--zero-share=0", f"--memory={memory}",
                 f"--socket={folder}/here"]
        stack.enter_context(_running([*route.source, *guest], "guest running"))
        _wait_until_it_answers(f"{folder}/here")
        pages = [f"--slot-pages={SLOT_PAGES[backing]}"] if BACKINGS[backing] else []
        send = [program, "send", "--json", *options, *pages, f"--send={mode}", f"--lanes={lanes}",
                f"--socket={folder}/here", f"{route.address}:{port}"]
        report = _report_of([*route.source, *before["source"], *send], 20 if route.far else 1)
    wanted = BACKINGS[backing]
    if wanted and report["slot_memory"] != wanted:
        fail(f"slots were asked for in {wanted} and came in {report['slot_memory']}; see `pagecast probe`")
    return report


def _wait_until_it_answers(path):
    """The guest says that it runs a moment before it listens."""
    for _ in range(PATIENCE_S * 100):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            if asking.connect_ex(path) == 0:
                return
        time.sleep(0.01)
    fail(f"the guest at {path} does not listen")


def _report_of(command, attempts):
    """The report of a migration; tried again while the far end is getting ready for the next one."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.5)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            lines = map(json.loads, done.stdout.splitlines())
            return next(line for line in lines if line["event"] == "report")
    said = done.stderr.strip().splitlines() or ["nothing"]
    fail(f"{' '.join(map(str, command))} failed: {said[-1]}")


def iperf3(route, lanes, zero_copy, congestion=None, seconds=2):
    """Bytes per second and CPU seconds per GB at each end of `lanes` streams of iperf3, the first second left out."""
    program = need("iperf3", "iperf3")
    port = str(PORT + 1)
    with contextlib.ExitStack() as stack:
        if not route.far:
            server = [*route.destination, program, "-s", "-1", "--forceflush", "-p", port]
            stack.enter_context(_running(server, "listening"))
        client = [*route.source, program, "-c", route.address, "-p", port, "-t", str(seconds), "-O", "1", "-J",
                  "-P", str(lanes), *(["-Z"] if zero_copy else []), *(["-C", congestion] if congestion else [])]
        done = subprocess.run(client, capture_output=True, text=True, timeout=PATIENCE_S)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"error": done.stderr.strip() or "it said nothing"}
    if "error" in answer:
        fail(f"iperf3 over {route.name}: {answer['error']}")
    received, used = answer["end"]["sum_received"], answer["end"]["cpu_utilization_percent"]
    rate = received["bits_per_second"] / 8
    return {
        "bytes_per_s": rate,
        "send_cpu_s_per_gb": used["host_total"] / 100 / rate * 1e9,
        "receive_cpu_s_per_gb": used["remote_total"] / 100 / rate * 1e9,
    }


def bare(route, size, congestion=None, zero_copy=False):
    """The same figures of one connection that carries `size` bytes from memory to memory and does nothing else, with
    `zero_copy` without a copy at the source."""
    program = [sys.executable, str(ROOT / "perf" / "bare.py")]
    with contextlib.ExitStack() as stack:
        receiver = [*route.destination, *program, "receive", route.address, str(size)]
        receiving, line = stack.enter_context(_running(receiver, "listening"))
        sender = [*route.source, *program, "sendfile" if zero_copy else "send", f"{route.address}:{line.split()[-1]}", str(size),
                  *([congestion] if congestion else [])]
        done = subprocess.run(sender, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode != 0:
            fail(f"bare.py over {route.name}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
        sent, received = json.loads(done.stdout), json.loads(receiving.stdout.readline())
    return {
        "bytes_per_s": sent["bytes_per_s"],
        "send_cpu_s_per_gb": sent["cpu_s_per_gb"],
        "receive_cpu_s_per_gb": received["cpu_s_per_gb"],
    }


def _wait_until_free(listen):
    """A guest that was received has the port until it has ended."""
    for _ in range(PATIENCE_S * 10):
        try:
            socket.create_server((listen, PORT)).close()
            return
        except OSError as error:
            refused = error.strerror
            time.sleep(0.1)
    fail(f"cannot listen on {listen}, port {PORT}: {refused}; give --serve an address of this machine")


def serve(program, listen):
    """Receives one guest after the other and drops it, with an iperf3 beside it, until interrupted."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagecast-throughput-"))
        yardstick = [need("iperf3", "iperf3"), "-s", "-B", listen, "-p", str(PORT + 1), "--forceflush"]
        stack.enter_context(_running(yardstick, "listening"))
        print(f"receiving on {listen}, ports {PORT} and {PORT + 1}; end with Ctrl-C", flush=True)
        receive = [program, "receive", "--die-with-parent", f"--listen={listen}:{PORT}", f"--socket={folder}/guest"]
        while True:
            _wait_until_free(listen)
            with _running(receive, "listening") as (process, _):
                while (line := process.stdout.readline()) and "guest running" not in line:
                    pass
                time.sleep(0.2)  # the source is told before the guest is dropped
