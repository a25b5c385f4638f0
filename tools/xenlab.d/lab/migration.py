"""One live migration of the guest from host to host, and one save and restore; each gives a record of what it came to.

The save helper under test runs at the source only; the receiver is always the stock one.
"""

import dataclasses
import json
import shlex
import struct

from . import guest, jobs, parts
from .clock import set_clocks
from .errors import LabError

PORT = 7000
LIMIT_S = 1800
SHORT_LIMIT_S = 120
PAGE_BYTES = 4096
TRIAL = "/root/trial"
WRAPPER = "/usr/sbin/lab-save-helper"
SENT_LOG = f"{TRIAL}/xl"
RECEIVED_LOG = "/root/received"
SAVED = "/root/guest.save"
SETTLE_LIMIT_S = 300


@dataclasses.dataclass
class Helper:
    """The save helper at the source: a program in dom0, None for the stock one, and its environment."""

    path: str | None = None
    environment: dict = dataclasses.field(default_factory=dict)

    def exports(self, strace=False):
        """The lines of a script that make `xl` use it, and have its cost written to the trial's folder."""
        settings = dict(self.environment, LIBXL_SAVE_HELPER=WRAPPER, LAB_TRIAL=TRIAL)
        settings["PAGECAST_REPORT"] = f"{TRIAL}/report.json"
        if self.path:
            settings["LAB_HELPER"] = self.path
        if strace:
            settings["LAB_STRACE"] = "1"
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())


@dataclasses.dataclass
class Record:
    """What a migration, or a save with its restore, came to. None: not to be had."""

    what: str
    seconds: float
    silence_ms: int
    errors: int
    writes: int
    # Transmissions of pages with data, and how far the hosts' clocks agreed, by which the silence may be off.
    pages: int | None = None
    clock_ms: float | None = None
    # What the source's network card has sent, protocol headers included.
    wire_bytes: int | None = None
    helper_cpu_s: float | None = None
    dom0_cpu_s: float | None = None
    # Calls by name, of the helper and its threads; counted only where that was asked for.
    syscalls: dict | None = None
    # Milliseconds of each part of the silence; only where that was asked for.
    parts: dict | None = None
    report: dict | None = None


def migrate(lab, source, destination, helper, strace=False, stamped=False):
    """Migrates the guest and waits until it has checked all of its memory at the destination. `stamped`: with xl's debug
    logs, from which the parts of the silence follow."""
    clock_ms = set_clocks(lab, [source, destination])
    before = guest.read(source).last()
    jobs.must(destination, f"rm -f {guest.CONSOLE}", SHORT_LIMIT_S)
    frames = populated_frames(source)
    receiver = start_receiver(destination, stamped)
    try:
        sent = jobs.run(source, sender_script(destination, helper, strace, stamped), LIMIT_S)
        if sent.code != 0:
            raise LabError(f"the migration from {source.name} failed: {reason(sent, receiver)}")
        if receiver.wait(SHORT_LIMIT_S) != 0:
            raise LabError(f"the receiver on {destination.name} failed: {last_error(receiver_text(receiver))}")
    finally:
        if receiver.code() is None:
            receiver.kill()
        receiver.forget()
    settled = settle(destination, before)
    numbers = trial_numbers(source)
    return Record(
        what=f"{source.name} to {destination.name}",
        seconds=numbers["seconds"],
        clock_ms=clock_ms,
        wire_bytes=int(numbers["wire_bytes"]),
        dom0_cpu_s=numbers["dom0_cpu_s"],
        pages=pages_sent(source, frames),
        helper_cpu_s=helper_cpu_s(source),
        syscalls=syscalls(source) if strace else None,
        parts=silence_parts(source, destination) if stamped else None,
        report=json_report(source),
        **settled,
    )


def start_receiver(host, stamped=False):
    """Has a host receive a guest with stock Xen, over TCP."""
    program = f"/usr/sbin/receive-stamped {RECEIVED_LOG}" if stamped else "xl migrate-receive"
    return jobs.Job(host, f"exec socat -b 1048576 TCP-LISTEN:{PORT},reuseaddr EXEC:'{program}'")


def transport(destination):
    """The command that carries the stream to a host that receives."""
    return f"socat -b 1048576 - TCP:{destination.address}:{PORT},retry=100,interval=0.1"


def sender_script(destination, helper, strace, stamped=False):
    """Migrates, and notes what that took: by dom0's own clock, its network card and Xen's account of its time."""
    migrate_guest = f"migrate -s '' {guest.NAME} \"{transport(destination)}\""
    command, on_failure = f"xl {migrate_guest}", ""
    if stamped:
        command = f"set -o pipefail; xl -vvv {migrate_guest} 2>&1 | /usr/sbin/stamp-lines {SENT_LOG}"
        on_failure = f"[ $code = 0 ] || cat {SENT_LOG} >&2"
    return f"""
rm -rf {TRIAL}; mkdir {TRIAL}
{helper.exports(strace)}
note() {{
    read -r up _ </proc/uptime
    echo $up $(cat /sys/class/net/eth0/statistics/tx_bytes) $(xl list 0 | awk 'END {{ print $NF }}') >>{TRIAL}/numbers
}}
note
{command}
code=$?
{on_failure}
note
exit $code
"""


def trial_numbers(host):
    """The differences between the two notes of the sender's script."""
    before, after = [
        [float(word) for word in line.split()] for line in trial_file(host, "numbers").decode().splitlines()
    ]
    seconds, wire_bytes, cpu_s = [end - begin for begin, end in zip(before, after)]
    return {"seconds": round(seconds, 2), "wire_bytes": wire_bytes, "dom0_cpu_s": round(cpu_s, 1)}


def silence_parts(source, destination):
    """Milliseconds of each part of the last migration's silence."""
    received = jobs.must(destination, f"cat {RECEIVED_LOG}", SHORT_LIMIT_S)
    return parts.cut({parts.SOURCE: jobs.must(source, f"cat {SENT_LOG}", SHORT_LIMIT_S), parts.DESTINATION: received})


def save_and_restore(host, helper):
    """Saves the guest to a file in dom0 and restores it from there with the stock program."""
    before = guest.read(host).last()
    frames = populated_frames(host)
    begin = jobs.must(host, "cat /proc/uptime", SHORT_LIMIT_S)
    script = f"rm -rf {TRIAL}; mkdir {TRIAL}\n{helper.exports()}exec xl save {guest.NAME} {SAVED}"
    saved = jobs.run(host, script, LIMIT_S)
    if saved.code != 0:
        raise LabError(f"xl save on {host.name} failed: {last_error(saved.err + saved.out)}")
    jobs.must(host, f"rm -f {guest.CONSOLE}", SHORT_LIMIT_S)
    restored = jobs.run(host, f"exec xl restore {SAVED}", LIMIT_S)
    if restored.code != 0:
        raise LabError(f"xl restore on {host.name} failed: {last_error(restored.err + restored.out)}")
    end = jobs.must(host, "cat /proc/uptime", SHORT_LIMIT_S)
    settled = settle(host, before)
    seconds = float(end.split()[0]) - float(begin.split()[0])
    return Record(
        what=f"save, restore {host.name}",
        seconds=round(seconds, 2),
        pages=pages_sent(host, frames),
        helper_cpu_s=helper_cpu_s(host),
        report=json_report(host),
        **settled,
    )


def settle(host, before):
    """Waits until the guest runs again, has checked its whole memory and goes on writing; says what it reports."""
    resumed = guest.wait_for(
        host,
        lambda console: [one for one in console.since(before["seq"]) if one["suspends"] > before["suspends"]],
        SETTLE_LIMIT_S,
        "runs on",
    )[0]

    def checked_and_writing(console):
        checks = [check for check in console.full_checks if check["suspends"] >= resumed["suspends"]]
        later = [report for report in console.since(resumed["seq"]) if report["writes"] > resumed["writes"]]
        return (console, later) if checks and later else None

    console, later = guest.wait_for(host, checked_and_writing, SETTLE_LIMIT_S, "goes on writing")
    last = later[-1]
    if last["writes"] < before["writes"]:
        raise LabError(f"the guest's counter has gone back from {before['writes']} to {last['writes']} writes")
    if last["errors"]:
        first = console.errors[0] if console.errors else "told on another host"
        raise LabError(f"the guest has found {last['errors']} errors in its memory; the first: {first}")
    silence_ms = max(report["silence_ms"] for report in console.since(before["seq"]))
    return {"silence_ms": silence_ms, "errors": last["errors"], "writes": last["writes"]}


def populated_frames(host):
    """How many frames the guest has, by Xen's own count."""
    listing = jobs.must(host, "xentop -b -i 1", SHORT_LIMIT_S)
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == [guest.NAME]:
            return int(words[4]) * 1024 // PAGE_BYTES
    raise LabError(f"{host.name} has no domain {guest.NAME}")


def trial_file(host, name):
    """A file of the last trial, empty if there is none."""
    done = jobs.run(host, f"cp {TRIAL}/{name} /lab/files/trial-{name}", SHORT_LIMIT_S)
    passing = host.share / "files" / f"trial-{name}"
    if done.code != 0 or not passing.exists():
        return b""
    content = passing.read_bytes()
    passing.unlink()
    return content


def helper_cpu_s(host):
    """Processor seconds of the save helper, user and system, by its own account when it ends."""
    words = trial_file(host, "time").decode().split()
    return round(sum(float(word) for word in words[-2:]), 2) if len(words) >= 2 else None


def syscalls(host):
    """Calls by name, from strace's table: share, seconds, microseconds a call, calls, perhaps errors, name."""
    counts = {}
    for line in trial_file(host, "strace").decode().splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            counts[words[-1]] = int(words[3])
    return counts


def json_report(host):
    """pagecast's own report of the migration: the whole file or, where it has progress lines as well, its last line."""
    text = trial_file(host, "report.json").decode(errors="replace").strip()
    for candidate in (text, text.rpartition("\n")[2]):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return None


def pages_sent(host, populated):
    """Transmissions of pages with data: by pagecast's report or the stock helper's messages."""
    report = json_report(host)
    if report:
        return report.get("pages_sent")
    rounds = stock_rounds(trial_file(host, "messages"))
    # The stock helper's first round counts the holes of the guest's address space as well.
    return sum(rounds) - (rounds[0] - populated) if rounds else None


def stock_rounds(messages):
    """Frames of each round of the stock helper, the stop-and-copy among them, from its messages to libxl.

    A message is a 16-bit length and that many bytes: a 16-bit number and its arguments. Number 2 is progress: two
    strings, each a 32-bit length and bytes with a NUL, and the 64-bit numbers done and total. A round begins at
    done = 0.
    """
    rounds = []
    at = 0
    while at + 2 <= len(messages):
        (length,) = struct.unpack_from("<H", messages, at)
        body = messages[at + 2 : at + 2 + length]
        at += 2 + length
        if len(body) < 2 or struct.unpack_from("<H", body)[0] != 2:
            continue
        place, texts = 2, []
        for _ in range(2):
            (size,) = struct.unpack_from("<I", body, place)
            texts.append(body[place + 4 : place + 4 + size])
            place += 4 + size
        if not texts[1].startswith(b"Frames"):
            continue
        (done,) = struct.unpack_from("<Q", body, place)
        if done == 0:
            rounds.append(0)
        else:
            rounds[-1] = done
    return rounds


def receiver_text(receiver):
    """All that the receiver has said."""
    return (receiver.read("err") + receiver.read("out")).decode(errors="replace")


def reason(sent, receiver):
    """Why a migration failed, in one line."""
    if sent.code == jobs.TIMED_OUT:
        return f"it was killed after {LIMIT_S} s"
    return f"{last_error(sent.err + sent.out)}; the receiver said: {last_error(receiver_text(receiver))}"


def last_error(text):
    """The line that most likely says why: the first that calls itself an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "nothing")
