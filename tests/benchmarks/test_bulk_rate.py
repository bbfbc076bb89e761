"""The benchmark of dsd-generate measures both sides on the same images."""

import re

from benchmarks.bulk_rate import OUTPUTS, TOGETHER, bench


def test_it_reports_the_rates_of_both(tiny_dir):
    lines = bench(tiny_dir, per_class=4, rounds=1, threads=1).splitlines()[2:]
    assert len(lines) == len(OUTPUTS) + len(TOGETHER)
    for line in lines:
        wall, share, processor, of_processor = re.search(r"([0-9.]+) +([0-9]+)% +([0-9.]+) +([0-9]+)%$", line).groups()
        assert float(wall) > 0 and float(processor) > 0 and int(share) <= 120 and int(of_processor) <= 120
