"""The command line of the lab."""

import argparse
import dataclasses
import signal
import sys

from . import compare, faults, guest, images, jobs, packages, streams, trials
from .cache import Cache
from .errors import LabError
from .lab import MOST_HOSTS, Lab

DESCRIPTION = """Emulated hosts with a real Xen 4.17 and a Debian 12 dom0, for trying live migration.
Everything is made of Debian's own packages in a cache folder ($PAGECAST_CACHE, by default target/xenlab in the
repository); nothing of Xen or QEMU is installed. Needs root, for a network namespace of its own. See docs/xenlab.md."""


def say(text):
    """A word on what is being done; standard output is for results."""
    print(f"xenlab: {text}", file=sys.stderr, flush=True)


def main():
    """Runs the command line and returns the exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    options = parser().parse_args()
    lab = Lab(Cache(options.cache), say)
    try:
        return options.action(lab, options) or 0
    except LabError as error:
        print(f"xenlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("xenlab: interrupted", file=sys.stderr)
        return 130


def interrupt(_number, _frame):
    """A request to end is treated like Ctrl-C: what was started is ended first."""
    raise KeyboardInterrupt


def parser():
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="tools/xenlab", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--cache", metavar="FOLDER", help="the cache folder")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, action, text):
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.set_defaults(action=action)
        return one

    command("fetch", fetch, "download and unpack the packages")
    command("build", build, "make the images anew, the guest's program included")
    static = command("static", static_binary, "compile a program of this repository for dom0; prints its path")
    static.add_argument("binary", nargs="?", default="pagecast", help="its name (default: pagecast)")
    up = command("up", bring_up, "boot the hosts h1 and h2, and fetch and build before that what is not there")
    up.add_argument("--hosts", type=int, choices=range(1, MOST_HOSTS + 1), default=MOST_HOSTS, help="how many")
    command("status", status, "show which hosts stand and which domains they run")
    run = command("run", run_command, "run a command in a host's dom0, with its output and its exit code")
    host_argument(run)
    env_argument(run, "it")
    run.add_argument("--timeout", metavar="SECONDS", type=float, help="kill it then, and exit with 124")
    run.add_argument("command", nargs="+", help="the command, after `--`")
    put = command("put", put_file, "copy a file into a host's dom0, its mode with it")
    host_argument(put)
    put.add_argument("file")
    put.add_argument("name", nargs="?", help="its name there; a relative one is in /root")
    get = command("get", get_file, "copy a file out of a host's dom0")
    host_argument(get)
    get.add_argument("name")
    get.add_argument("file")
    create = command("create", create_guest, "start the guest on a host, in place of one that is there")
    host_argument(create)
    guest_arguments(create)
    command("guest", show_guest, "show where the guest is and what it says about itself")
    text = "migrate the guest back and forth, save and restore it; boots a lab if none stands"
    test = command("migrate-test", migrate_test, text)
    test.add_argument("--helper", metavar="PATH", help="the save helper at the source (default: the stock one)")
    test.add_argument("--count", metavar="N", type=int, default=10, help="migrations in a row (default: 10)")
    test.add_argument("--no-save", action="store_true", help="no save and restore after them")
    test.add_argument("--verify", action="store_true", help="have verify-stream-v2 read the saved stream")
    test.add_argument("--keep", action="store_true", help="leave the lab standing")
    env_argument(test, "the helper")
    guest_arguments(test)
    against = command("compare", compare_helpers, "measure the stock save helper and pagecast's policies by turns")
    against.add_argument("--helper", metavar="PATH", help="pagecast, static (default: the stock helper alone)")
    against.add_argument("--workloads", metavar="NAMES", type=names, default=["kv", "sweep"], help="default: kv,sweep")
    text = "given to the helper as PAGECAST_POLICY (default: xen,xen-skip,ar)"
    against.add_argument("--policies", metavar="NAMES", type=names, default=["xen", "xen-skip", "ar"], help=text)
    against.add_argument("--runs", metavar="N", type=int, default=5, help="of each, for each workload (default: 5)")
    text = "no further run that counts system calls"
    against.add_argument("--no-strace", dest="strace", action="store_false", help=text)
    text = "have xl log everything, and show where the silence goes"
    against.add_argument("--parts", action="store_true", help=text)
    against.add_argument("--keep", action="store_true", help="leave the lab standing")
    env_argument(against, "pagecast")
    guest_arguments(against, workload=False)
    text = "have all that can go wrong happen to migrations, and see that the guest lives on; boots a lab if none stands"
    fault = command("fault-test", fault_test, text)
    fault.add_argument("--helper", metavar="PATH", required=True, help="pagecast, static")
    text = f"of {','.join(faults.FAULTS)} (default: all)"
    fault.add_argument("--faults", metavar="NAMES", type=names, default=list(faults.FAULTS), help=text)
    fault.add_argument("--keep", action="store_true", help="leave the lab standing")
    env_argument(fault, "the helper")
    guest_arguments(fault)
    text = "have the stock helper and pagecast save the same suspended guest, and compare; boots a lab if none stands"
    stream = command("stream-test", stream_test, text)
    stream.add_argument("--helper", metavar="PATH", required=True, help="pagecast, static")
    stream.add_argument("--keep", action="store_true", help="leave the lab standing")
    env_argument(stream, "pagecast")
    guest_arguments(stream)
    command("down", take_down, "end the hosts and take their network away")
    return top


def host_argument(command):
    """The host that a command is for."""
    command.add_argument("host", metavar="HOST", help="h1 or h2")


def env_argument(command, whom):
    """Variables for what runs in dom0."""
    text = f"set a variable for {whom}; repeatable"
    command.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help=text)


def names(text):
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def guest_arguments(command, workload=True):
    """The guest's settings, by the names and with the defaults that they have everywhere."""
    defaults = guest.Settings()
    if workload:
        command.add_argument("--workload", choices=guest.WORKLOADS, default=defaults.workload)
    for name, text in {
        "memory-mib": "the domain's memory",
        "used-mib": "what its program works on",
        "rate": "page writes per second, 0 for as fast as they go",
        "seed": "chooses contents and random operations",
        "zero-percent": "share of the 2 MiB chunks that are never written",
        "report-ms": "time between two reports",
    }.items():
        default = getattr(defaults, name.replace("-", "_"))
        command.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{text} (default: {default})")


def settings_of(options):
    """The guest's settings as they were given."""
    given = {field.name: getattr(options, field.name, field.default) for field in dataclasses.fields(guest.Settings)}
    return guest.Settings(**given)


def environment_of(settings):
    """The variables given as NAME=VALUE."""
    for setting in settings:
        if "=" not in setting:
            raise LabError(f"--env {setting}: write NAME=VALUE")
    return dict(setting.split("=", 1) for setting in settings)


def fetch(lab, _options):
    """`fetch`"""
    packages.fetch(lab.cache, say)


def build(lab, _options):
    """`build`"""
    packages.fetch(lab.cache, say)
    images.build(lab.cache, say)


def static_binary(_lab, options):
    """`static`"""
    print(images.build_static(options.binary, say))


def bring_up(lab, options):
    """`up`"""
    lab.up(options.hosts)


def status(lab, _options):
    """`status`"""
    if not lab.hosts():
        print("no host stands")
    for host in lab.hosts():
        state = "ready" if host.is_ready() else "booting"
        print(f"{host.name} {host.address}: {state if host.is_running() else 'dead: ' + host.emulator_says()}")
        if host.is_running() and host.is_ready():
            print(jobs.must(host, "xl list", 60), end="")


def run_command(lab, options):
    """`run`"""
    script = jobs.script_of(options.command, environment_of(options.env))
    return jobs.run_shown(lab.host(options.host), script, options.timeout)


def put_file(lab, options):
    """`put`"""
    name = options.name or options.file.rsplit("/", 1)[-1]
    jobs.put(lab.host(options.host), options.file, name)


def get_file(lab, options):
    """`get`"""
    jobs.get(lab.host(options.host), options.name, options.file)


def create_guest(lab, options):
    """`create`"""
    report = guest.create_anew(lab.hosts(), lab.host(options.host), settings_of(options))
    print(" ".join(f"{name}={value}" for name, value in report.items()))


def show_guest(lab, _options):
    """`guest`"""
    host = guest.find(lab.hosts())
    console = guest.read(host)
    print(f"on {host.name}")
    for line in [*console.errors, *console.panics]:
        print(line)
    since = guest.asked_last(lab.cache)
    last = console.last()
    if last:
        longest = max((report["silence_ms"] for report in console.since(since)), default=0)
        print(" ".join(f"{name}={value}" for name, value in last.items()))
        print(f"longest silence since asked last: {longest} ms")
        guest.note_asked(lab.cache, last["seq"])
    return 1 if console.errors or console.panics or (last and last["errors"]) else 0


def migrate_test(lab, options):
    """`migrate-test`"""
    if options.count < 1:
        raise LabError("--count: at least 1")
    trials.migrate_test(lab, options, settings_of(options), environment_of(options.env))


def compare_helpers(lab, options):
    """`compare`"""
    unknown = [name for name in options.workloads if name not in guest.WORKLOADS]
    if unknown or options.runs < 1:
        what = f"--workloads: there is no {unknown[0]}" if unknown else "--runs: at least 1"
        raise LabError(f"{what}; the workloads are {', '.join(guest.WORKLOADS)}")
    compare.compare(lab, options, settings_of(options), environment_of(options.env))


def fault_test(lab, options):
    """`fault-test`"""
    unknown = [name for name in options.faults if name not in faults.FAULTS]
    if unknown:
        raise LabError(f"--faults: there is no {unknown[0]}; the faults are {', '.join(faults.FAULTS)}")
    faults.fault_test(lab, options, settings_of(options), environment_of(options.env))


def stream_test(lab, options):
    """`stream-test`"""
    streams.stream_test(lab, options, settings_of(options), environment_of(options.env))


def take_down(lab, _options):
    """`down`"""
    lab.down()
