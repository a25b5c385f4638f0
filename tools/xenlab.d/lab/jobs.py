"""Commands in a dom0, through a folder that it shares with this machine.

A job is a folder: the script `command` goes in, `out`, `err` and, when it has ended, `code` come back. It is made under
`files`, appears whole in `queue`, and dom0 moves it to `jobs` when it takes it.
"""

import os
import shlex
import shutil
import socket
import sys
import time
import uuid

from .errors import LabError

TIMED_OUT = 124
POLL_S = 0.05
CONSOLE_CHECK_EVERY = 20


class Job:
    """A job that has been given to a host."""

    def __init__(self, host, script):
        self.host = host
        self.name = uuid.uuid4().hex[:12]
        self.folder = host.share / "jobs" / self.name
        made = host.share / "files" / self.name
        made.mkdir()
        (made / "command").write_text(script)
        made.rename(host.share / "queue" / self.name)
        ring(host)

    def code(self):
        """Its exit code, None while it runs."""
        try:
            return int((self.folder / "code").read_text())
        except OSError:
            return None

    def wait(self, timeout_s=None, follow=None):
        """Waits for its end and returns its exit code, 124 if it had to be killed; `follow` is called meanwhile."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        rounds = 0
        while True:
            code = self.code()
            if follow:
                follow()
            if code is not None:
                return code
            if deadline and time.monotonic() > deadline:
                self.kill()
                return TIMED_OUT
            rounds += 1
            if rounds % CONSOLE_CHECK_EVERY == 0:
                self.host.check()
            time.sleep(POLL_S)

    def kill(self):
        """Ends the job and what it has started."""
        try:
            pid = int((self.folder / "pid").read_text())
        except (OSError, ValueError):
            shutil.rmtree(self.host.share / "queue" / self.name, ignore_errors=True)
            return
        Job(self.host, f"kill -- -{pid}; sleep 1; kill -9 -- -{pid}").forget(wait=True)

    def read(self, name):
        """What has come of `out` or `err` so far."""
        try:
            return (self.folder / name).read_bytes()
        except OSError:
            return b""

    def forget(self, wait=False):
        """Removes its folder."""
        if wait:
            self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Follower:
    """Passes a job's output on as it comes."""

    def __init__(self, job):
        self.sources = [(job.folder / "out", sys.stdout.buffer, [0]), (job.folder / "err", sys.stderr.buffer, [0])]

    def __call__(self):
        for path, sink, position in self.sources:
            try:
                with open(path, "rb") as file:
                    file.seek(position[0])
                    new = file.read()
            except OSError:
                continue
            if new:
                position[0] += len(new)
                sink.write(new)
                sink.flush()


class Output:
    """What a finished command came to."""

    def __init__(self, code, out, err):
        self.code = code
        self.out = out
        self.err = err


def ring(host):
    """Tells dom0 that there is a job. It would see it anyway, but two seconds later."""
    try:
        with socket.socket(socket.AF_UNIX) as bell:
            bell.connect(short_path(host.bell))
            bell.sendall(b"\n")
    except OSError:
        pass


def short_path(path):
    """The path as few bytes, for a socket's address has room for 107."""
    return min(str(path), os.path.relpath(path), key=len)


def script_of(arguments, environment=None):
    """A shell script that runs one command with these additions to its environment."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    return "\n".join([*lines, "exec " + shlex.join(arguments), ""])


def run(host, script, timeout_s=None):
    """Runs a script to its end; for commands whose output is wanted rather than shown."""
    need(host)
    job = Job(host, script)
    try:
        code = job.wait(timeout_s)
        return Output(code, job.read("out").decode(errors="replace"), job.read("err").decode(errors="replace"))
    except KeyboardInterrupt:
        job.kill()
        raise
    finally:
        job.forget()


def run_shown(host, script, timeout_s=None):
    """Runs a script and passes its output on as it comes; returns its exit code."""
    need(host)
    job = Job(host, script)
    try:
        return job.wait(timeout_s, Follower(job))
    except KeyboardInterrupt:
        job.kill()
        raise
    finally:
        job.forget()


def must(host, script, timeout_s=None):
    """Runs a script that has to succeed; returns its standard output."""
    done = run(host, script, timeout_s)
    if done.code != 0:
        said = (done.err.strip() or done.out.strip() or "nothing").splitlines()[-1]
        what = "was killed after its time limit" if done.code == TIMED_OUT else f"ended with {done.code}"
        raise LabError(f"{host.name}: `{script.strip().splitlines()[-1]}` {what}: {said}")
    return done.out


def need(host):
    """A host that a command is for has to stand."""
    if not host.is_ready():
        raise LabError(f"{host.name} is not up: call `tools/xenlab up` first, with --hosts 2 for h2")
    host.check()


def put(host, source, name):
    """Copies a file into dom0, its mode with it; a relative name is one in /root."""
    need(host)
    passing = host.share / "files" / uuid.uuid4().hex
    shutil.copy(source, passing)
    try:
        must(host, f"cp -p /lab/files/{passing.name} {shlex.quote(name)}")
    finally:
        passing.unlink()


def get(host, name, destination):
    """Copies a file out of dom0."""
    need(host)
    passing = host.share / "files" / uuid.uuid4().hex
    try:
        must(host, f"cp -p {shlex.quote(name)} /lab/files/{passing.name}")
        shutil.move(passing, destination)
    finally:
        passing.unlink(missing_ok=True)
