"""A whole lab: its hosts and their network, brought up and taken down together."""

import os
import shutil
import subprocess

from . import images, packages
from .errors import LabError
from .host import Host
from .network import Network

MOST_HOSTS = 2


class Lab:
    """The lab of one cache folder; at most one stands in it."""

    def __init__(self, cache, say):
        self.cache = cache
        self.say = say
        self.network = Network(cache)

    def hosts(self):
        """The hosts that have been started and not taken down."""
        names = [f"h{number}" for number in range(1, MOST_HOSTS + 1)]
        return [Host(self.cache, name) for name in names if self.cache.host(name).exists()]

    def host(self, name):
        """A host by its name."""
        for host in self.hosts():
            if host.name == name:
                return host
        standing = ", ".join(host.name for host in self.hosts()) or "none"
        raise LabError(f"there is no host {name} (standing: {standing}): call `tools/xenlab up --hosts 2`")

    def prepare(self):
        """Fetches and builds what is not there yet."""
        packages.fetch(self.cache, self.say)
        if not images.is_built(self.cache):
            images.build(self.cache, self.say)

    def up(self, count):
        """Boots so many hosts; whatever goes wrong, or Ctrl-C, leaves nothing standing."""
        if self.hosts() or self.network.exists():
            raise LabError("a lab is standing already: use it, or call `tools/xenlab down` first")
        check_machine()
        self.prepare()
        hosts = [Host(self.cache, f"h{number}") for number in range(1, count + 1)]
        try:
            self.network.create([host.tap for host in hosts])
            for host in hosts:
                self.say(f"starting {host.name}")
                host.start(self.network)
            for host in hosts:
                host.wait_until_ready()
                self.say(f"{host.name} is ready at {host.address}")
        except BaseException:
            self.keep_consoles()
            self.down()
            raise

    def keep_consoles(self):
        """Keeps what the hosts' consoles have shown, for whoever wants to know why one died."""
        self.cache.results.mkdir(parents=True, exist_ok=True)
        for host in self.hosts():
            if host.console.exists():
                shutil.copy(host.console, self.cache.results / f"{host.name}-console.log")

    def down(self):
        """Ends the hosts and takes their network away. Nothing else is touched."""
        for host in self.hosts():
            host.stop()
        self.network.remove()
        shutil.rmtree(self.cache.run, ignore_errors=True)


def check_machine():
    """Says what a lab would need and this machine lacks."""
    if os.geteuid() != 0:
        raise LabError("root is needed, for the network namespace and its taps: call this with sudo")
    if not shutil.which("ip"):
        raise LabError("`ip` is missing: install iproute2")
    if not os.path.exists("/dev/net/tun"):
        raise LabError("/dev/net/tun is missing: load the module tun, or give this container the device")
    probe = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    if probe.returncode != 0:
        raise LabError(f"network namespaces are not to be had here: {probe.stderr.strip()}")
