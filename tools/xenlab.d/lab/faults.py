"""`fault-test`: what goes wrong in a migration, and that the guest runs on at the source after it.

Each fault hits a live migration under load with the save helper directly below `xl`. Afterwards the guest has to write
and check on, on the host where it was; its dirty logging has to be off (but after SIGKILL); and the next migration has to succeed.
"""

import dataclasses
import time

from . import guest, jobs, migration
from .errors import LabError
from .migration import Helper
from .tables import table
from .trials import HELPER, Standing, check_helper, install

# 128 MiB take ten seconds then, of which the fault is early.
BANDWIDTH = "100Mbit"
LEAD_S = 3
START_LIMIT_S = 60
END_LIMIT_S = 300
STALL_S = 5
SHORT_LIMIT_S = 120


def kill_helper(signal):
    """Sends the save helper at the source a signal."""

    def act(source, _destination):
        jobs.must(source, f"kill -{signal} $(pidof save-helper)", SHORT_LIMIT_S)

    return act


def kill_receiver(_source, destination):
    """The destination's part ends without a word."""
    jobs.must(destination, "kill -KILL $(pidof libxl-save-helper)", SHORT_LIMIT_S)


def cut_connection(_source, destination):
    """What carries the stream dies."""
    jobs.must(destination, "killall -KILL socat", SHORT_LIMIT_S)


def stall_receiver(source, destination):
    """The destination stops reading; some time later somebody has enough and ends the save helper."""
    jobs.must(destination, "kill -STOP $(pidof libxl-save-helper)", SHORT_LIMIT_S)
    before = guest.read(source).last()
    time.sleep(STALL_S)
    runs_on(source, before)
    jobs.must(source, "kill -TERM $(pidof save-helper)", SHORT_LIMIT_S)


def refuse_suspend(source, _destination):
    """The guest does not do what it is asked, for it is paused; libxl waits a minute for it."""
    jobs.must(source, f"xl pause {guest.NAME}", SHORT_LIMIT_S)


def end_in_suspend(source, destination):
    """The save helper is ended while libxl waits for the guest to suspend itself."""
    refuse_suspend(source, destination)
    time.sleep(20)
    jobs.must(source, "kill -TERM $(pidof save-helper)", SHORT_LIMIT_S)


def balloon(source, _destination):
    """The guest gives up a fifth of its memory and takes it back."""
    jobs.must(source, f"xl mem-set {guest.NAME} 100; sleep 2; xl mem-set {guest.NAME} 128", SHORT_LIMIT_S)


@dataclasses.dataclass
class Fault:
    """Something that goes wrong."""

    what: str
    act: object
    # Whether the migration is to succeed all the same.
    survived: bool = False
    # Whether the guest is paused then.
    pauses: bool = False
    # Whether nobody is left to turn dirty logging off. The next saver takes it over, pagecast as well as the stock one.
    leaves_logging: bool = False


FAULTS = {
    "sigterm": Fault("SIGTERM to the save helper", kill_helper("TERM")),
    "sigkill": Fault("SIGKILL to the save helper", kill_helper("KILL"), leaves_logging=True),
    "receiver-dies": Fault("the receiver is killed", kill_receiver),
    "connection-cut": Fault("the connection is cut", cut_connection),
    "receiver-stalls": Fault("the receiver stops reading, then SIGTERM", stall_receiver),
    "no-suspend": Fault("the guest does not suspend", refuse_suspend, pauses=True),
    "sigterm-in-suspend": Fault("SIGTERM while the guest does not suspend", end_in_suspend, pauses=True),
    "balloon": Fault("the guest balloons", balloon, survived=True),
}
HEADS = ["fault", "exit", "after s", "guest", "dirty logging", "next migration", "what xl said"]


def fault_test(lab, options, settings, environment):
    """Has everything named go wrong, one after the other; the first that ends badly ends the test."""
    check_helper(options.helper)
    rows = []
    with Standing(lab, options.keep) as hosts:
        helper = Helper(install(hosts, options.helper), environment)
        guest.create_anew(hosts, hosts[0], settings)
        source, destination = hosts
        try:
            for name in options.faults:
                fault = FAULTS[name]
                row = strike(source, destination, fault, environment)
                if fault.survived:
                    source, destination = destination, source
                after = migration.migrate(lab, source, destination, helper)
                source, destination = destination, source
                rows.append([*row[:-1], f"{after.seconds} s, {after.errors} errors", row[-1]])
                lab.say(f"{fault.what}: as it should be")
        finally:
            if rows:
                print(table(HEADS, rows), flush=True)
    print(f"{len(rows)} faults: the guest lives on after each")


def strike(source, destination, fault, environment):
    """One migration that something happens to; the row of the table, but for the migration after it."""
    before = guest.read(source).last()
    jobs.must(destination, f"rm -f {guest.CONSOLE}", SHORT_LIMIT_S)
    receiver = migration.start_receiver(destination)
    sender = jobs.Job(source, sender_script(destination, environment))
    try:
        await_helper(source, sender)
        time.sleep(LEAD_S)
        struck = time.monotonic()
        fault.act(source, destination)
        code = sender.wait(END_LIMIT_S)
        seconds = time.monotonic() - struck
        said = migration.last_error((sender.read("err") + sender.read("out")).decode(errors="replace"))
    finally:
        for job in (sender, receiver):
            if job.code() is None:
                job.kill()
            job.forget()
    if fault.pauses:
        jobs.must(source, f"xl unpause {guest.NAME}", SHORT_LIMIT_S)
    if (code == 0) != fault.survived or code == jobs.TIMED_OUT:
        raise LabError(f"{fault.what}: xl migrate ended with {code}: {said}")
    if fault.survived:
        settled = migration.settle(destination, before)
        return [fault.what, code, round(seconds, 1), f"moved, {settled['errors']} errors", log_dirty(destination), "-"]
    guest.destroy(destination)
    writes = runs_on(source, before)
    logging = log_dirty(source, fault.leaves_logging)
    return [fault.what, code, round(seconds, 1), f"{writes} writes since, 0 errors", logging, said]


def sender_script(destination, environment):
    """Migrates slowly, with the save helper itself below `xl`, so that signals reach it."""
    settings = {"PAGECAST_BANDWIDTH": BANDWIDTH, **environment, "LIBXL_SAVE_HELPER": HELPER}
    command = ["xl", "migrate", "-s", "", guest.NAME, migration.transport(destination)]
    return jobs.script_of(command, settings)


def await_helper(source, sender):
    """Waits until the save helper is there."""
    deadline = time.monotonic() + START_LIMIT_S
    while jobs.run(source, "pidof save-helper", SHORT_LIMIT_S).code != 0:
        if sender.code() is not None or time.monotonic() > deadline:
            raise LabError("xl migrate has started no save helper: " + sender.read("err").decode(errors="replace"))


def runs_on(source, before):
    """Waits until the guest has written again, two reports later, and has found no error; returns its writes since."""
    now = guest.read(source).last()

    def later(console):
        last = console.last()
        return last if last and last["seq"] >= now["seq"] + 2 and last["writes"] > now["writes"] else None

    last = guest.wait_for(source, later, SHORT_LIMIT_S, "runs on after a fault")
    if last["errors"]:
        raise LabError(f"the guest has found {last['errors']} errors in its memory after a fault")
    return last["writes"] - before["writes"]


def log_dirty(host, may_be_on=False):
    """Whether somebody still logs the guest's writes, which is an error unless it may be so: turning it on succeeds only once."""
    probed = jobs.must(host, f"{HELPER} probe --domain $(xl domid {guest.NAME})", SHORT_LIMIT_S)
    line = next((line for line in probed.splitlines() if "domain dirty logging" in line), "")
    if "yes: ENABLE" in line:
        return "off"
    if may_be_on and "may be in use" in line:
        return "on"
    raise LabError(f"the guest's dirty logging was left on: {line.strip() or 'the probe says nothing of it'}")
