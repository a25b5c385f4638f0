"""The wall clocks of the hosts, set by this machine's.

A guest sees how long a migration has kept it from running only by the two hosts' wall clocks. Xen reads the emulated
hardware's clock to the second when it boots, and emulated time drifts under load, so they are set before each
migration.
"""

import pathlib
import subprocess
import sys

from . import jobs
from .errors import LabError
from .network import BRIDGE_ADDRESS

PORT = 7123
LIMIT_S = 120


def set_clocks(lab, hosts):
    """Sets the clocks of these hosts; returns the ms within which they agree: the longest of the round trips."""
    program = pathlib.Path(__file__).with_name("time_server.py")
    server = subprocess.Popen(
        lab.network.command(sys.executable, str(program), BRIDGE_ADDRESS, str(PORT)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        if server.stdout.readline() != b"ready\n":
            raise LabError("the time server does not start: see above")
        command = f"set-clock {BRIDGE_ADDRESS} {PORT}"
        return max(float(jobs.must(host, command, LIMIT_S).split()[1]) for host in hosts)
    finally:
        server.stdin.close()
        server.wait()
