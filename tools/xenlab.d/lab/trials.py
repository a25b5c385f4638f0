"""`migrate-test`: many migrations in a row under load, then a save and a restore, unattended."""

import dataclasses
import json
import os
import subprocess
import sys
import time

from . import guest, jobs, migration
from .errors import LabError
from .migration import Helper
from .tables import mebibytes, table

HELPER = "/root/save-helper"
HEADS = ["#", "what", "seconds", "silence ms", "pages sent", "MiB on the wire", "helper CPU s", "guest's errors"]


class Standing:
    """Two hosts for as long as the body runs; a lab that stands already is used and left standing."""

    def __init__(self, lab, keep):
        self.lab = lab
        self.ours = not lab.hosts()
        self.keep = keep

    def __enter__(self):
        if self.ours:
            self.lab.up(2)
        return [self.lab.host("h1"), self.lab.host("h2")]

    def __exit__(self, kind, _error, _trace):
        if kind:
            self.lab.keep_consoles()
        if self.ours and not self.keep:
            self.lab.down()


def check_helper(path):
    """Says what is wrong with a save helper before anything is booted for it."""
    if path and not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise LabError(f"the save helper {path} is not there or may not be executed: see `tools/xenlab static`")


def install(hosts, path):
    """Puts a save helper into each dom0; returns its name there, None for the stock one."""
    if not path:
        return None
    for host in hosts:
        jobs.put(host, path, HELPER)
    return HELPER


def migrate_test(lab, options, settings, environment):
    """Runs the test; prints a line for each migration as it comes and the table at the end."""
    check_helper(options.helper)
    records = []
    with Standing(lab, options.keep) as hosts:
        helper = Helper(install(hosts, options.helper), environment)
        lab.say(f"starting the guest: {settings.workload}, {settings.memory_mib} MiB, {settings.rate} page writes/s")
        guest.create_anew(hosts, hosts[0], settings)
        try:
            for number in range(options.count):
                source, destination = hosts[number % 2], hosts[(number + 1) % 2]
                records.append(migration.migrate(lab, source, destination, helper))
                tell(lab, records)
            if not options.no_save:
                host = hosts[options.count % 2]
                records.append(migration.save_and_restore(host, helper))
                tell(lab, records)
                keep_stream(lab, host, options.verify)
        finally:
            if records:
                print(table(HEADS, rows(records)), flush=True)
                lab.say(f"each migration is a line of {write_lines(lab.cache, records)}")
    done = f"{options.count} migrations" + ("" if options.no_save else ", a save and a restore")
    print(f"{done}: no error in the guest's memory")


def write_lines(cache, records):
    """Writes the records, pagecast's own reports in them, as JSON lines to a new file; returns its name."""
    cache.results.mkdir(parents=True, exist_ok=True)
    path = cache.results / time.strftime("migrate-test-%Y%m%d-%H%M%S.jsonl")
    path.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
    return path


def tell(lab, records):
    """A word on the migration just done."""
    one = records[-1]
    lab.say(f"{len(records)}: {one.what}: {one.seconds} s, silence {one.silence_ms} ms, {one.errors} errors")


def rows(records):
    """The table's rows."""
    return [
        [
            number,
            one.what,
            one.seconds,
            one.silence_ms,
            one.pages,
            mebibytes(one.wire_bytes),
            one.helper_cpu_s,
            one.errors,
        ]
        for number, one in enumerate(records, start=1)
    ]


def keep_stream(lab, host, verify):
    """Fetches the saved stream out of dom0, where it takes memory, and has Xen's own verifier read it."""
    lab.cache.results.mkdir(parents=True, exist_ok=True)
    kept = lab.cache.results / "guest.save"
    jobs.get(host, migration.SAVED, kept)
    jobs.must(host, f"rm {migration.SAVED}")
    lab.say(f"the saved stream is {kept}")
    if verify:
        verify_stream(lab.cache, kept)
        lab.say("verify-stream-v2 accepts it")


def verify_stream(cache, stream, kind="xl"):
    """Runs Xen's verifier, from the unpacked package, on a stream as `xl` saves it, or a bare one (`libxc`)."""
    xen = cache.debian / "usr/lib/xen-4.17"
    environment = dict(os.environ, PYTHONPATH=str(xen / "lib/python"), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, xen / "bin/verify-stream-v2", "-f", kind, "-i", stream]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip().splitlines() or ["nothing"]
        raise LabError(f"verify-stream-v2 rejects {stream}: {said[-1]}")
