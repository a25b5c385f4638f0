"""A process that outlives the command that started it, found again by its number and the time of its start."""

import json
import os
import signal
import subprocess
import time

GRACE_S = 5


def start(command, record, log, cwd=None, env=None):
    """Starts a process in a session of its own and writes down which it is."""
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    record.write_text(json.dumps({"pid": child.pid, "started": start_time(child.pid)}))
    return child


def start_time(pid):
    """When the process started, in the kernel's ticks; None if there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state == "Z" else int(started)


def is_running(record):
    """Whether the process that was written down still runs."""
    known = load(record)
    return known is not None and known["started"] is not None and start_time(known["pid"]) == known["started"]


def stop(record):
    """Ends the process that was written down, and no other that has its number by now."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        if is_running(record):
            os.kill(load(record)["pid"], number)
        while is_running(record) and time.monotonic() < deadline:
            time.sleep(0.05)
    record.unlink(missing_ok=True)


def load(record):
    """What was written down; None if nothing was, or only part of it."""
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return None
