"""`stream-test`: the stock save helper and ours save the same suspended guest, and the two streams are compared."""

import pathlib
import shutil
import subprocess

from . import guest, jobs, migration
from .errors import LabError
from .migration import SAVED
from .trials import HELPER, Standing, check_helper, install, verify_stream

BOTH = pathlib.Path(__file__).resolve().parent.parent / "both-savers"
IN_DOM0 = "/root/both-savers"
# Shared with this machine: three streams are more than dom0 has memory for. (The stock helper's cannot go there too: 9p
# would have to pin foreign pages.)
STREAMS = "/lab/files/streams"
LIMIT_S = 1800
SHORT_LIMIT_S = 120
# How ours was asked to save: a guest that stands still from the start, and one that could run.
KINDS = ["still", "live"]


def stream_test(lab, options, settings, environment):
    """Runs the test; raises an error if a page or another record differs."""
    check_helper(options.helper)
    kept = lab.cache.results / "streams"
    kept.mkdir(parents=True, exist_ok=True)
    with Standing(lab, options.keep) as hosts:
        install(hosts, options.helper)
        host = hosts[0]
        lab.say(f"starting the guest: {settings.workload}, {settings.memory_mib} MiB, {settings.rate} page writes/s")
        guest.create_anew(hosts, host, settings)
        jobs.put(host, BOTH, IN_DOM0)
        before = guest.read(host).last()
        try:
            save_with_both(host, environment)
            for name in KINDS:
                shutil.move(host.share / "files" / "streams" / name, kept / name)
        finally:
            shutil.rmtree(host.share / "files" / "streams", ignore_errors=True)
        jobs.get(host, SAVED, kept / "stock")
        jobs.must(host, f"rm -f {guest.CONSOLE}\nxl restore {SAVED}\nrm {SAVED}", LIMIT_S)
        settled = migration.settle(host, before)
    for name in KINDS:
        verify_stream(lab.cache, kept / name, "libxc")
        print(f"stock against ours, {name}: {compare(options.helper, kept / 'stock', kept / name)}", flush=True)
    print(f"the streams are in {kept}; the guest was restored from the stock one: {settled['errors']} errors")


def save_with_both(host, environment):
    """Saves the guest with `xl save`, by the stock helper, and into two files more by ours."""
    settings = {**environment, "LIBXL_SAVE_HELPER": IN_DOM0, "LAB_OTHER": HELPER, "LAB_STREAMS": STREAMS}
    script = f"mkdir -p {STREAMS}\n" + jobs.script_of(["xl", "save", guest.NAME, SAVED], settings)
    saved = jobs.run(host, script, LIMIT_S)
    if saved.code != 0:
        raise LabError(f"xl save on {host.name} failed: {migration.last_error(saved.err + saved.out)}")


def compare(program, one, other):
    """What pagecast on this machine says of two streams; an error if they are not of equal guests."""
    done = subprocess.run([program, "inspect", one, "--compare", other], capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    if done.returncode != 0:
        raise LabError(f"{one.name} and {other.name} differ: {said[-1]}; both are in {one.parent}")
    return said[-1]
