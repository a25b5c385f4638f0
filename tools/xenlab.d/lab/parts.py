"""Where the silence of a migrated guest goes: the debug logs of both hosts' xl, with the time of each line, cut where one
program begins to wait for the next."""

import statistics

from .errors import LabError
from .tables import table

SOURCE, DESTINATION = "source", "destination"
# Where the first part begins and where each of them ends: whose log says so, and how.
BEGIN = (SOURCE, "suspend request via")
ENDS = {
    "suspend": (SOURCE, "guest has suspended"),
    "save": (SOURCE, "libxl__fd_flags_restore"),
    "restore": (DESTINATION, "Transfer complete"),
    "start": (DESTINATION, "Domain started"),
}


def cut(logs):
    """Milliseconds of each part, from the logs by host: lines that begin with seconds since 1970."""
    begin = moment(logs, *BEGIN)
    parts = {}
    for name, (host, text) in ENDS.items():
        end = moment(logs, host, text)
        parts[name] = round((end - begin) * 1e3, 1)
        begin = end
    return parts


def moment(logs, host, text):
    """When a text was logged last."""
    times = [line.split(maxsplit=1)[0] for line in logs[host].splitlines() if text in line]
    if not times:
        raise LabError(f"the log of the {host}'s xl has no line with {text!r}")
    return float(times[-1])


def summary(lines, workload, contenders):
    """The table of one workload: medians. `rest` is the silence outside of all parts."""
    rows = []
    for name in contenders:
        own = [line for line in lines if line["contender"] == name and line["guest"]["workload"] == workload]
        own = [line for line in own if line["parts"]]
        columns = [[line["parts"][part] for line in own] for part in ENDS]
        sums = [sum(line["parts"].values()) for line in own]
        rests = [line["silence_ms"] - parts for line, parts in zip(own, sums)]
        medians = [round(statistics.median(column)) for column in [*columns, sums, rests]]
        rows.append([name, len(own), *medians])
    return table(["save helper", "runs", *[f"{part} ms" for part in [*ENDS, "sum of these", "rest"]]], rows)
