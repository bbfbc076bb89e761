"""The committed pages of studies and benchmarks are those of their committed results."""

import json

import pytest

from benchmarks import training_speed
from studies import nearest, precision_cost, sampler_report
from tests.support.data import ROOT


@pytest.mark.parametrize(
    ("results", "page", "write"),
    [
        ("studies/results/precision.json", "docs/precision.md", precision_cost.document),
        ("studies/results/demo/nearest.json", "docs/nearest.md", nearest.document),
        ("studies/results/samplers.json", "docs/samplers.md", sampler_report.document),
        ("benchmarks/results/training-speed.json", "docs/training-speed.md", training_speed.report),
    ],
)
def test_a_committed_page_shows_the_committed_results(results, page, write):
    assert write(json.loads((ROOT / results).read_text())) == (ROOT / page).read_text()
