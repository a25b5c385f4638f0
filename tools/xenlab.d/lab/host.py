"""One emulated host: a QEMU with Xen and a dom0 in it.

The settings are those that were seen to be stable (docs/xenlab.md): two emulated processors, the first for dom0 alone
and the second for the guest.
"""

import os
import shutil
import time

from . import process
from .errors import LabError
from .images import loader
from .network import PREFIX_BITS, address

READY_LIMIT_S = 900
# Without what Xen or a guest stumbles over when QEMU 7.2 emulates it (docs/xenlab.md, Pitfalls). xsave and what builds
# on it is out because a guest that had enabled AVX met an invalid opcode at its first AVX instruction after a move.
CPU = "EPYC,-smap,-smep,-monitor,-fsgsbase,-rdtscp,-xsave,-xsaveopt,-xsavec,-xgetbv1,-xsaves,-avx,-avx2,-fma,-f16c"
MEMORY_MIB = 3072
XEN_ARGUMENTS = (
    "console=com1 com1=115200,8n1 dom0_mem=1G,max:1G dom0_max_vcpus=1 dom0_vcpus_pin smap=0 smep=0 spec-ctrl=no xpti=0"
    " pcid=0 cpuidle=0 max_cstate=0 loglvl=warning guest_loglvl=warning bootscrub=0"
)
# No comma may be in here: QEMU splits its list of modules at commas.
KERNEL_ARGUMENTS = "console=hvc0 earlyprintk=xen quiet loglevel=4 mitigations=off"
# What the console shows when a host has died.
DEATHS = ("Panic on CPU", "Kernel panic", "FATAL TRAP", "Xen BUG at", "Attempted to kill init")
CONSOLE_TAIL_LINES = 15


class Host:
    """A host by its name, standing or not."""

    def __init__(self, cache, name):
        self.cache = cache
        self.name = name
        self.number = int(name.removeprefix("h"))
        self.address = address(self.number)
        self.tap = f"tap{name}"
        self.folder = cache.host(name)
        self.share = self.folder / "share"
        self.console = self.folder / "console.log"
        self.bell = self.folder / "bell"
        self.record = self.folder / "qemu.json"

    def start(self, network):
        """Starts the emulator; the host is ready only some time later."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in ("queue", "jobs", "files"):
            (self.share / folder).mkdir(parents=True)
        environment = dict(os.environ, QEMU_MODULE_DIR=str(self.cache.debian / "usr/lib/x86_64-linux-gnu/qemu"))
        log = self.folder / "qemu.log"
        process.start(network.command(*self.command()), self.record, log, cwd=self.cache.images, env=environment)

    def command(self):
        """QEMU with its arguments; it runs in the folder of the images."""
        debian = self.cache.debian
        linux = f"vmlinux {KERNEL_ARGUMENTS} labhost={self.name} labip={self.address}/{PREFIX_BITS}"
        mac = f"52:54:00:00:00:{self.number:02x}"
        return [
            *[str(part) for part in loader(debian)],
            str(debian / "usr/bin/qemu-system-x86_64"),
            *("-L", str(debian / "usr/share/qemu"), "-L", str(debian / "usr/share/seabios")),
            *("-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", CPU, "-smp", "2", "-m", f"{MEMORY_MIB}M"),
            *("-display", "none", "-no-reboot", "-nodefaults"),
            *("-serial", f"file:{self.console}", "-serial", f"unix:{self.bell},server=on,wait=off"),
            *("-kernel", "xen", "-append", XEN_ARGUMENTS, "-initrd", f"{linux},dom0.cpio"),
            *("-virtfs", f"local,path={self.share},mount_tag=lab,security_model=none,multidevs=remap"),
            *("-device", f"virtio-net-pci,netdev=n0,mac={mac},romfile="),
            *("-netdev", f"tap,id=n0,ifname={self.tap},script=no,downscript=no,vhost=off"),
        ]

    def is_running(self):
        """Whether its emulator runs."""
        return process.is_running(self.record)

    def is_ready(self):
        """Whether its dom0 has said that it is ready."""
        return (self.share / "ready").exists()

    def wait_until_ready(self):
        """Waits for dom0, which takes half a minute, on a busy machine a few."""
        deadline = time.monotonic() + READY_LIMIT_S
        while not self.is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise self.failure(f"is not ready after {READY_LIMIT_S} s")
            time.sleep(0.2)

    def check(self):
        """Raises an error if the host has died."""
        seen = [death for death in DEATHS if death in self.console_text()]
        if seen:
            raise self.failure(f"has died ({seen[0]})")
        if not self.is_running():
            raise self.failure("has ended: " + self.emulator_says())

    def failure(self, what):
        """An error with the end of the console."""
        tail = "\n".join(self.console_text().splitlines()[-CONSOLE_TAIL_LINES:])
        return LabError(f"{self.name} {what}; its console ({self.console}) ends with:\n{tail}")

    def console_text(self):
        """All that its console has shown."""
        try:
            return self.console.read_bytes().decode(errors="replace").replace("\r", "")
        except OSError:
            return ""

    def emulator_says(self):
        """The last line of QEMU's own messages."""
        try:
            lines = (self.folder / "qemu.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "QEMU said nothing"

    def stop(self):
        """Ends the emulator at once; what its dom0 had goes with it."""
        process.stop(self.record)
