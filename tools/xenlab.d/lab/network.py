"""The network between the hosts: a bridge and one tap for each, in a network namespace of the lab's own.

The taps have vnet_hdr, so that a host can send large segments; `-netdev socket`, which cannot, moves about 1.3 MB/s.
"""

import contextlib
import hashlib
import os
import signal
import subprocess

from .errors import LabError

BRIDGE = "labbr"
BRIDGE_ADDRESS = "10.99.0.254"
PREFIX_BITS = 24


def address(number):
    """The address of host number 1 or 2."""
    return f"10.99.0.{number}"


class Network:
    """The namespace of one cache folder; its name is that folder's own."""

    def __init__(self, cache):
        self.name = "xenlab-" + hashlib.sha256(str(cache.folder).encode()).hexdigest()[:8]

    def exists(self):
        """Whether the namespace is there."""
        listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
        return any(line.split()[:1] == [self.name] for line in listing.stdout.splitlines())

    def create(self, taps):
        """Makes the namespace with a bridge and these taps."""
        ip("netns", "add", self.name)
        self.inside("link", "set", "lo", "up")
        self.inside("link", "add", BRIDGE, "type", "bridge")
        self.inside("address", "add", f"{BRIDGE_ADDRESS}/{PREFIX_BITS}", "dev", BRIDGE)
        self.inside("link", "set", BRIDGE, "up")
        for tap in taps:
            self.inside("tuntap", "add", tap, "mode", "tap", "vnet_hdr")
            self.inside("link", "set", tap, "master", BRIDGE, "up")

    def remove(self):
        """Takes the namespace away, and ends what is still running in it."""
        if not self.exists():
            return
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", self.name)

    def inside(self, *arguments):
        """An `ip` command in the namespace."""
        ip("-n", self.name, *arguments)

    def command(self, *arguments):
        """The command that runs another one inside."""
        return ["ip", "netns", "exec", self.name, *arguments]


def ip(*arguments):
    """Runs `ip` and returns what it printed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout
