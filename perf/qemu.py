"""QEMU's live migration as a yardstick for `perf/throughput`: multifd with two channels, to another QEMU.

The guest's memory is a file full of random bytes; the machine is stopped, so that nothing is written and no firmware
runs. Needs qemu-system-x86_64 7.2 or later; KVM is not used.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from common import fail, need

PROGRAM = "qemu-system-x86_64"
OLDEST = (7, 2)
CHANNELS = 2
PATIENCE_S = 60
BLOCK = 16 << 20
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def check():
    """The program; ends where there is none, or one that is too old."""
    program = need(PROGRAM, "qemu-system-x86")
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    if not found or tuple(map(int, found.groups())) < OLDEST:
        fail(f"--qemu needs QEMU 7.2 or later, and this is {said.splitlines()[0] if said else 'silent'}")
    return program


def size_of(text):
    """Bytes of a size as pagecast takes it, as far as a guest's memory is concerned: 512MiB, 2GiB."""
    found = re.fullmatch(r"(\d+)(KiB|MiB|GiB)", text)
    if not found:
        fail(f"--memory {text}: with --qemu give a whole number of MiB or GiB")
    return int(found[1]) * UNITS[found[2]]


@contextlib.contextmanager
def random_memory(size):
    """A file of random bytes in memory."""
    with tempfile.TemporaryDirectory(prefix="pagecast-qemu-", dir="/dev/shm") as folder:
        path = os.path.join(folder, "memory")
        with open(path, "wb") as file:
            for start in range(0, size, BLOCK):
                file.write(os.urandom(min(BLOCK, size - start)))
        yield path


class Monitor:
    """QEMU's control socket."""

    def __init__(self, path, process):
        until = time.monotonic() + PATIENCE_S
        self.socket = socket.socket(socket.AF_UNIX)
        while self.socket.connect_ex(path) != 0:
            if process.poll() is not None or time.monotonic() > until:
                fail(f"{PROGRAM} did not start; run it by hand to see why")
            time.sleep(0.01)
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self.tell("qmp_capabilities")

    def tell(self, command, **arguments):
        """Runs a command and gives its answer."""
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while line := self.lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                fail(f"QEMU refuses {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        fail(f"QEMU ended while it was asked for {command}")


def _cpu_s(pid):
    """CPU seconds of a process and all its threads."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _qemu(program, place, size, memory, path, *more):
    """A stopped machine and its monitor."""
    command = [
        *place, program, "-machine", "q35,memory-backend=memory", "-accel", "tcg", "-m", f"{size >> 20}", "-object",
        f"{memory},id=memory,size={size}", "-S", "-nodefaults", "-display", "none", "-qmp",
        f"unix:{path},server=on,wait=off", *more,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process, Monitor(path, process)
    finally:
        process.terminate()
        process.wait()


def migrate(route, program, size, memory_file, port):
    """Bytes per second and CPU seconds per GB at each end of one migration."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagecast-qemu-"))
        memory = f"memory-backend-file,mem-path={memory_file},share=on"
        source, here = stack.enter_context(_qemu(program, route.source, size, memory, f"{folder}/here"))
        memory = "memory-backend-ram,prealloc=on"
        destination, there = stack.enter_context(_qemu(
            program, route.destination, size, memory, f"{folder}/there", "-incoming", "defer"))
        for monitor in (here, there):
            monitor.tell("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
            monitor.tell("migrate-set-parameters", **{"multifd-channels": CHANNELS, "max-bandwidth": 1 << 40})
        address = f"tcp:{route.address}:{port}"
        there.tell("migrate-incoming", uri=address)
        ends = {"send": source.pid, "receive": destination.pid}
        before = {stage: _cpu_s(pid) for stage, pid in ends.items()}
        here.tell("migrate", uri=address)
        while (state := here.tell("query-migrate")).get("status") != "completed":
            if state.get("status") in ("failed", "cancelled"):
                fail(f"QEMU's migration {state['status']}: {state.get('error-desc', 'it does not say why')}")
            time.sleep(0.02)
        sent = state["ram"]["transferred"]
        used = {stage: _cpu_s(pid) - before[stage] for stage, pid in ends.items()}
    return {
        "bytes_per_s": sent / state["total-time"] * 1e3,
        **{f"{stage}_cpu_s_per_gb": seconds / sent * 1e9 for stage, seconds in used.items()},
    }
