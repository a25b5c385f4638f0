"""The guest of the lab: its configuration, and what it says about itself on its console.

xenconsoled in each dom0 writes the console to a file. A guest's unread console output moves with it, so after a
migration the destination's file goes on where the source's ended; the numbers in the lines say which came first.
"""

import dataclasses
import re
import time

from . import jobs
from .errors import LabError

NAME = "guest"
# On the host where it was created and on one where it has arrived.
CONSOLE = f"/var/log/xen/console/guest-{NAME}*.log"
WORKLOADS = ["idle", "kv", "uniform", "sweep", "gc", "phases", "storm"]
READY_LIMIT_S = 300
REPORT_LIMIT_S = 120
POLL_S = 0.3
# Whole lines only: the last one may still be on its way.
REPORT = re.compile(r"lab-guest: (seq=.*)\n")
ERROR = re.compile(r"lab-guest: (error .*)\n")
FULL_CHECK = re.compile(r"lab-guest: full-check (.*)\n")
PANIC = re.compile(r"Kernel panic.*")


@dataclasses.dataclass
class Settings:
    """What a guest is and does."""

    workload: str = "kv"
    memory_mib: int = 128
    used_mib: int = 48
    rate: int = 1000
    seed: int = 1
    zero_percent: int = 25
    report_ms: int = 1000

    def configuration(self):
        """The file for `xl create`. The words after `--` are the arguments of the guest's init."""
        words = (
            f"workload={self.workload} memory={self.used_mib}M rate={self.rate} seed={self.seed}"
            f" zero={self.zero_percent} report_ms={self.report_ms}"
        )
        return f"""name = "{NAME}"
type = "pvh"
kernel = "/guest/vmlinux.gz"
ramdisk = "/guest/guest.cpio"
extra = "console=hvc0 quiet loglevel=3 mitigations=off -- {words}"
memory = {self.memory_mib}
vcpus = 1
cpus = "1"
tsc_mode = "native"
on_poweroff = "preserve"
on_reboot = "preserve"
on_crash = "preserve"
"""


def fields(text):
    """The numbers of a line of `name=value` words."""
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


class Console:
    """What the guest has said on one host."""

    def __init__(self, text):
        self.text = text = text.replace("\r", "")
        self.reports = [fields(line) for line in REPORT.findall(text)]
        self.errors = ERROR.findall(text)
        self.full_checks = [fields(line) for line in FULL_CHECK.findall(text)]
        self.panics = PANIC.findall(text)

    def last(self):
        """The latest report, None if there is none."""
        return max(self.reports, key=lambda report: report["seq"], default=None)

    def since(self, sequence):
        """The reports after this one."""
        return [report for report in self.reports if report["seq"] > sequence]

    def check(self, host):
        """Raises an error if the guest has died."""
        if self.panics:
            raise LabError(f"the guest on {host.name} has died: {self.panics[-1]}")


def read(host):
    """All that the guest has said on a host since it came there last."""
    return Console(jobs.run(host, f"cat {CONSOLE}", REPORT_LIMIT_S).out)


def create(host, settings):
    """Starts the guest and waits until its memory is written once and it has reported."""
    write = f"cat >/root/guest.cfg <<'END'\n{settings.configuration()}END"
    jobs.must(host, f"rm -f {CONSOLE}\n{write}\nxl create -q /root/guest.cfg", READY_LIMIT_S)
    return wait_for(host, lambda console: console.last(), READY_LIMIT_S, "reports")


def create_anew(hosts, host, settings):
    """Starts the guest on one of the hosts, in place of whatever there is of it on any."""
    for each in hosts:
        destroy(each)
    return create(host, settings)


def destroy(host):
    """Ends whatever there is of the guest on a host, halves of a failed migration included."""
    names = f"{NAME} {NAME}--incoming {NAME}--migratedaway"
    jobs.run(host, f"for name in {names}; do xl destroy $name; done", REPORT_LIMIT_S)


def domain_on(host, name=NAME):
    """Whether the host has a domain of this name."""
    return jobs.run(host, f"xl domid {name}", REPORT_LIMIT_S).code == 0


def find(hosts):
    """The host that the guest is on."""
    for host in hosts:
        if domain_on(host):
            return host
    raise LabError("no host has the guest: call `tools/xenlab guest create`")


def asked_last(cache):
    """The number of the last report that somebody was shown; -1 if there is none."""
    try:
        return int((cache.run / "asked").read_text())
    except (OSError, ValueError):
        return -1


def note_asked(cache, sequence):
    """Remembers up to which report somebody was shown."""
    (cache.run / "asked").write_text(str(sequence))


def wait_for(host, wanted, limit_s, what):
    """Reads the console again and again until something wanted is in it, and returns that."""
    deadline = time.monotonic() + limit_s
    while True:
        console = read(host)
        console.check(host)
        found = wanted(console)
        if found:
            return found
        if time.monotonic() > deadline:
            tail = "\n".join(console.text.splitlines()[-5:]) or "nothing"
            raise LabError(f"the guest on {host.name} does not say in {limit_s} s that it {what}; its console:\n{tail}")
        time.sleep(POLL_S)
