"""`compare`: the stock save helper and pagecast's policies by turns, under the same guest, and a table of medians.

The contenders take turns, so that what the machine does meanwhile hits all of them; each run begins with another one,
so that none always goes the same way. System calls are counted in a run of their own, because strace slows down what it
counts.
"""

import dataclasses
import json
import statistics
import time

from . import guest, migration, parts
from .migration import Helper
from .tables import mebibytes, table
from .trials import Standing, check_helper, install

STOCK = "stock"
# What a column shows, and how many digits of it after the point.
COLUMNS = {
    "seconds": ("seconds", 1),
    "silence ms": ("silence_ms", 0),
    "pages sent": ("pages", 0),
    "MiB on the wire": ("wire_mib", 1),
    "helper CPU s": ("helper_cpu_s", 2),
    "dom0 CPU s": ("dom0_cpu_s", 1),
}
CALLS = ["ioctl", "mmap", "munmap"]


def compare(lab, options, settings, environment):
    """Runs all of it; each record goes into a file of JSON lines as it comes."""
    check_helper(options.helper)
    lab.cache.results.mkdir(parents=True, exist_ok=True)
    path = lab.cache.results / time.strftime("compare-%Y%m%d-%H%M%S.jsonl")
    lines = []
    with Standing(lab, options.keep) as hosts, open(path, "w", encoding="utf-8") as file:
        contenders = contenders_of(install(hosts, options.helper), options.policies, environment)
        turns = Turns(lab, hosts, contenders, options.parts)
        for workload in options.workloads:
            turns.begin(dataclasses.replace(settings, workload=workload))
            for run in range(options.runs + options.strace):
                traced = run >= options.runs
                for line in turns.round(run, traced):
                    lines.append(line)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
            print(f"\n{workload}:\n\n{summary(lines, workload, list(contenders))}", flush=True)
            if options.parts:
                print(f"\n{parts.summary(lines, workload, list(contenders))}", flush=True)
    lab.say(f"each migration is a line of {path}")


def contenders_of(helper, policies, environment):
    """The contenders by name. Without a helper the stock one is measured alone."""
    contenders = {STOCK: Helper()}
    if helper:
        for policy in policies:
            contenders[f"pagecast {policy}"] = Helper(helper, dict(environment, PAGECAST_POLICY=policy))
    return contenders


class Turns:
    """The migrations one after the other; the guest goes back and forth."""

    def __init__(self, lab, hosts, contenders, stamped=False):
        self.lab = lab
        self.hosts = hosts
        self.contenders = contenders
        self.stamped = stamped

    def begin(self, settings):
        """A fresh guest on the first host."""
        self.settings = settings
        guest.create_anew(self.hosts, self.hosts[0], settings)
        self.on_first = True

    def round(self, run, traced):
        """One migration with each contender; yields what goes into the file."""
        names = list(self.contenders)
        first = run % len(names)
        for name in names[first:] + names[:first]:
            source, destination = self.hosts if self.on_first else reversed(self.hosts)
            stamped = self.stamped and not traced
            record = migration.migrate(self.lab, source, destination, self.contenders[name], traced, stamped)
            self.on_first = not self.on_first
            self.lab.say(
                f"{self.settings.workload}, {name}, {'traced' if traced else f'run {run + 1}'}:"
                f" {record.seconds} s, silence {record.silence_ms} ms"
            )
            yield dict(
                contender=name,
                run=run,
                traced=traced,
                guest=dataclasses.asdict(self.settings),
                wire_mib=mebibytes(record.wire_bytes),
                **dataclasses.asdict(record),
            )


def summary(lines, workload, contenders):
    """The table of one workload: median and, in brackets, least and most; calls from the traced run."""
    rows = []
    for name in contenders:
        own = [line for line in lines if line["contender"] == name and line["guest"]["workload"] == workload]
        timed = [line for line in own if not line["traced"]]
        counts = next((line["syscalls"] for line in own if line["traced"]), None)
        calls = [counts.get(call, 0) if counts else None for call in CALLS]
        rows.append([name, len(timed), *[spread(timed, *column) for column in COLUMNS.values()], *calls])
    return table(["save helper", "runs", *COLUMNS, *[f"{call} calls" for call in CALLS]], rows)


def spread(lines, key, digits):
    """Median, least and most of a field; None if no line has it."""
    values = [line[key] for line in lines if line[key] is not None]
    if not values:
        return None
    shown = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"
