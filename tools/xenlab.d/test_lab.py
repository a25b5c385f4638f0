"""Tests of what the lab makes and reads, which need no lab: `python3 -m unittest discover tools/xenlab.d`."""

import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from lab import compare, guest, images, jobs, migration, parts, process, tables  # noqa: E402
from lab.cpio import Cpio  # noqa: E402
from lab.errors import LabError  # noqa: E402


def message(number, *texts, numbers=()):
    """A message of the save helper to libxl."""
    strings = b"".join(struct.pack("<I", len(text) + 1) + text.encode() + b"\0" for text in texts)
    body = struct.pack("<H", number) + strings + struct.pack(f"<{len(numbers)}Q", *numbers)
    return struct.pack("<H", len(body)) + body


def progress(text, done, total):
    """A message about the progress of a round."""
    return message(2, "xc", text, numbers=(done, total))


class StockHelper(unittest.TestCase):
    def test_each_round_counts_once_also_the_last_that_has_the_same_name(self):
        messages = (
            message(3)
            + progress("Start of stream", 0, 0)
            + progress("Frames iteration 0", 0, 3000)
            + progress("Frames iteration 0", 1024, 3000)
            + progress("Frames iteration 0", 3000, 3000)
            + progress("Frames iteration 4", 0, 46)
            + progress("Frames iteration 4", 46, 46)
            + progress("Domain now suspended", 0, 0)
            + progress("Frames iteration 4", 0, 435)
            + progress("Frames iteration 4", 435, 435)
            + message(10)
        )
        self.assertEqual(migration.stock_rounds(messages), [3000, 46, 435])
        self.assertEqual(migration.stock_rounds(b""), [])

    def test_the_line_that_says_why_is_found(self):
        self.assertEqual(migration.last_error("a\nxc: error: no\nb"), "xc: error: no")
        self.assertEqual(migration.last_error("a\nb\n"), "b")
        self.assertEqual(migration.last_error(""), "nothing")


class Guest(unittest.TestCase):
    TEXT = (
        "lab-guest: ready pages=1024\r\n"
        "lab-guest: seq=4 writes=10 errors=0 silence_ms=9 suspends=0\r\n"
        "lab-guest: error page 0x2a9 is an older version (found at operation 12)\r\n"
        "lab-guest: full-check pages=1024 errors=1 took_ms=9 suspends=1\r\n"
        "lab-guest: seq=5 writes=12 errors=1 silence_ms=700 suspends=1\r\n"
    )

    def test_reports_errors_and_checks_are_read_from_the_console(self):
        console = guest.Console(self.TEXT)
        self.assertEqual(console.last()["writes"], 12)
        self.assertEqual([report["silence_ms"] for report in console.since(4)], [700])
        self.assertEqual(console.errors, ["error page 0x2a9 is an older version (found at operation 12)"])
        self.assertEqual(console.full_checks[0]["suspends"], 1)

    def test_a_line_that_is_cut_short_is_no_report(self):
        self.assertEqual(guest.Console("lab-guest: seq=4 writes=1").reports, [])

    def test_a_panic_is_an_error(self):
        class Host:
            name = "h1"

        with self.assertRaisesRegex(LabError, "h1 has died: Kernel panic - not syncing: x"):
            guest.Console("[ 1.0] Kernel panic - not syncing: x\n").check(Host)

    def test_the_settings_reach_the_guests_command_line(self):
        text = guest.Settings(workload="sweep", used_mib=8, rate=7).configuration()
        self.assertIn("-- workload=sweep memory=8M rate=7 seed=1 zero=25 report_ms=1000\"", text)


class Results(unittest.TestCase):
    def test_a_comparison_shows_median_least_and_most_of_the_runs_that_were_not_traced(self):
        lines = [
            {"contender": "stock", "traced": False, "guest": {"workload": "kv"}, "seconds": seconds, "syscalls": None}
            for seconds in (3.0, 1.0, 2.5)
        ]
        lines.append(dict(lines[0], traced=True, seconds=99.0, syscalls={"ioctl": 8, "munmap": 5}))
        for line in lines:
            line.update(silence_ms=5, pages=None, wire_mib=1.5, helper_cpu_s=None, dom0_cpu_s=2.0)
        head, _, row = compare.summary(json.loads(json.dumps(lines)), "kv", ["stock"]).splitlines()
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        self.assertEqual(cells[:5], ["stock", "3", "2.5 (1.0 to 3.0)", "5 (5 to 5)", "-"])
        self.assertEqual(cells[-3:], ["8", "0", "5"])
        self.assertEqual(head.count("|"), row.count("|"))

    def test_the_parts_of_a_silence_are_cut_at_the_last_lines_that_say_so_on_either_host(self):
        source = "9.0 guest has suspended\n10.0 x suspend request via XenBus\n10.07 guest has suspended\n"
        logs = {
            "source": source + "10.2 debug: libxl.c:798:libxl__fd_flags_restore: fnctl\n",
            "destination": "10.25 migration target: Transfer complete, r\n10.3 Domain started successsfully.\n",
        }
        cut = parts.cut(logs)
        self.assertEqual(cut, {"suspend": 70.0, "save": 130.0, "restore": 50.0, "start": 50.0})
        line = {"contender": "stock", "guest": {"workload": "kv"}, "silence_ms": 420, "parts": cut}
        row = parts.summary([line, dict(line, parts=None)], "kv", ["stock"]).splitlines()[-1]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        self.assertEqual(cells, ["stock", "1", "70", "130", "50", "50", "300", "120"])
        with self.assertRaisesRegex(LabError, "destination's xl has no line with 'Domain started'"):
            parts.cut(dict(logs, destination="10.25 Transfer complete\n"))

    def test_a_table_has_lines_of_one_width(self):
        text = tables.table(["a", "bb"], [["x", 1], ["yyy", None]])
        self.assertEqual(len({len(line) for line in text.splitlines()}), 1)


class Images(unittest.TestCase):
    def test_an_archive_names_each_folder_before_what_is_in_it_and_ends_aligned(self):
        archive = Cpio()
        archive.text("a/b/c", "12345")
        archive.link("a/b/d", "c")
        archive.text("a/b/c", "again")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "x.cpio"
            archive.save(path)
            content = path.read_bytes()
        self.assertEqual(list(entries(content)), [("a", b""), ("a/b", b""), ("a/b/c", b"12345"), ("a/b/d", b"c")])
        self.assertEqual(len(content) % 4, 0)

    def test_what_is_no_kernel_is_refused(self):
        with self.assertRaisesRegex(LabError, "no bzImage"):
            images.kernel_elf(bytes(0x1000))


def entries(content):
    """Names and contents of an archive, up to its trailer."""
    at = 0
    while True:
        assert content[at : at + 6] == b"070701"
        size, name_size = (int(content[at + place : at + place + 8], 16) for place in (54, 94))
        name = content[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return
        yield name, content[at : at + size]
        at = (at + size + 3) & ~3


class Processes(unittest.TestCase):
    def test_a_process_is_ended_and_a_stranger_with_its_number_is_not(self):
        with tempfile.TemporaryDirectory() as folder:
            record = pathlib.Path(folder) / "record.json"
            child = process.start(["sleep", "60"], record, pathlib.Path(folder) / "log")
            self.assertTrue(process.is_running(record))
            known = json.loads(record.read_text())
            record.write_text(json.dumps(dict(known, started=known["started"] + 1)))
            process.stop(record)
            self.assertIsNone(child.poll())
            record.write_text(json.dumps(known))
            process.stop(record)
            self.assertEqual(child.wait(5), -15)
            self.assertFalse(process.is_running(record))

    def test_a_process_that_has_ended_at_once_does_not_run(self):
        with tempfile.TemporaryDirectory() as folder:
            record = pathlib.Path(folder) / "record.json"
            record.write_text(json.dumps({"pid": 2**22 + 1, "started": None}))
            self.assertFalse(process.is_running(record))


class Scripts(unittest.TestCase):
    def test_arguments_and_variables_arrive_as_they_are(self):
        script = jobs.script_of(["sh", "-c", 'printf "%s|" "$1" "$V"', "x", "a b'c"], {"V": "1 $2"})
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "a b'c|1 $2|")


if __name__ == "__main__":
    unittest.main()
