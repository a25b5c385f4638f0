"""What the instruments conclude and how they take stacks apart. Nothing is measured here."""

import importlib.machinery
import importlib.util
import random
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # noqa: E402
import sink  # noqa: E402


def script(name):
    """An instrument as a module."""
    loader = importlib.machinery.SourceFileLoader(f"perf_{name}", str(HERE / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


class Ratios(unittest.TestCase):
    """`ratio_interval` and the verdicts made of it."""

    def test_the_interval_covers_the_median_as_often_as_it_says(self):
        dice, inside, tries = random.Random(1), 0, 4000
        for _ in range(tries):
            ratio = common.ratio_interval([dice.lognormvariate(0, 0.3) for _ in range(9)], [1.0] * 9)
            inside += ratio["low"] <= 1.0 <= ratio["high"]
        self.assertAlmostEqual(inside / tries, ratio["coverage"], delta=0.01)
        self.assertGreaterEqual(ratio["coverage"], common.CONFIDENCE)

    def test_fewer_than_six_pairs_never_reach_the_confidence(self):
        for pairs in range(1, 9):
            ratio = common.ratio_interval([1.0] * pairs, [1.0] * pairs)
            self.assertEqual(ratio["coverage"] >= common.CONFIDENCE, pairs >= 6)

    def test_a_ratio_to_nothing_is_no_ratio(self):
        self.assertIsNone(common.ratio_interval([1.0], [0.0])["median"])

    def test_a_verdict_names_the_better_side_and_a_positive_percentage(self):
        judge = script("compare").judgement
        less, more = common.ratio_interval([0.9] * 8, [1.0] * 8), common.ratio_interval([1.25] * 8, [1.0] * 8)
        self.assertEqual(judge("tmt", less), "A is faster by 10.0 % (10.0 to 10.0)")
        self.assertEqual(judge("tmt", more), "B is faster by 20.0 % (20.0 to 20.0)")
        self.assertEqual(judge("throughput", more), "A is ahead in throughput by 25.0 % (25.0 to 25.0)")
        self.assertTrue(judge("throughput", less).startswith("B is ahead in throughput by 11.1 %"))

    def test_an_interval_around_one_is_no_difference(self):
        ratio = common.ratio_interval([0.9, 1.1] * 5, [1.0] * 10)
        self.assertEqual(script("compare").judgement("tmt", ratio), "no difference can be told")


class Stacks(unittest.TestCase):
    """What `perf/flamegraph --off-cpu` makes of perf's text."""

    TEXT = """\
pc-map0 7 [000] 10.000100: sched:sched_switch: prev_comm=pc-map0 prev_pid=7 prev_prio=120 prev_state=S ==> x
\tffffffff82265ec8 __schedule+0x628 ([kernel.kallsyms])
\tffffffff8226db90 do_nanosleep+0x100 ([kernel.kallsyms])
\t          1098d9 sleep+0x19 (/usr/lib/libc.so.6)

pc-map0 7 [000] 10.000110: PERF_RECORD_SWITCH OUT
pc-map0 7 [001] 10.000400: PERF_RECORD_SWITCH IN
pc-send0 8 [000] 11.000000: sched:sched_switch: prev_comm=pc-send0 prev_pid=8 prev_prio=120 prev_state=R ==> x
\tffffffff82265ec8 __schedule+0x628 ([kernel.kallsyms])

pc-send0 8 [001] 11.000050: PERF_RECORD_SWITCH IN
""".splitlines()

    def test_a_wait_lasts_from_out_to_in_under_its_stack(self):
        folded = script("flamegraph").off_cpu_stacks(self.TEXT)
        self.assertEqual(folded, ["pc-map0;sleep;do_nanosleep;__schedule 300", "pc-send0;[preempted];__schedule 50"])

    def test_the_table_names_what_was_waited_in(self):
        flamegraph = script("flamegraph")
        rows = flamegraph.by_thread(flamegraph.off_cpu_stacks(self.TEXT))
        self.assertEqual(rows, [("pc-map0", 300, "do_nanosleep", 300), ("pc-send0", 50, "[preempted]", 50)])


class Frames(unittest.TestCase):
    """What `sink.py` puts on the wire."""

    def test_a_header_with_its_checksum_in_it_sums_to_nothing(self):
        for length in (20, 32, 170):
            data = random.Random(length).randbytes(length)
            self.assertEqual(sink.checksum(data + sink.checksum(data).to_bytes(2, "big")), 0)


if __name__ == "__main__":
    unittest.main()
