import pytest

from dsd_serve.engines import load_engine
from dsd_serve.params import SamplingParams
from export.tensorrt.checks import MOST_LABELS, evenly, run_checks


@pytest.mark.parametrize("name", ["own_dir", "plain_dir", "flow_map_dir"])
def test_an_engine_passes_against_itself_whatever_its_classes(name, request):
    engine = load_engine("onnx", request.getfixturevalue(name))
    checks = run_checks(engine, engine, "fp32", SamplingParams())
    assert len(checks) == 5
    assert all(check.passed for check in checks), checks
    jumps = 2 if engine.config.flow_map else 1
    assert f"0 of {5 * jumps * (engine.config.num_classes + 1)} rows" in checks[0].text


def test_labels_are_spread_evenly():
    assert evenly((1, 207, 950), 2) == (1, 207)
    assert evenly((), 2) == ()
    assert len(evenly(range(100_000), MOST_LABELS)) == MOST_LABELS
