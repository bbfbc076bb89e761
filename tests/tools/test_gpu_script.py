import os
import subprocess

from tests.support.data import ROOT


def test_a_step_that_fails_does_not_end_the_others(tmp_path):
    for name, code in (("nvidia-smi", ""), ("python", 'echo "$*" >> "$STEPS"; case $* in *pytest*) exit 3;; esac')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STEPS": str(tmp_path / "steps")}
    done = subprocess.run(["bash", ROOT / "tools/gpu.sh"], env=environment, capture_output=True, text=True)
    steps = (tmp_path / "steps").read_text()
    assert "pytest -m gpu" in steps and "benchmarks.gpu_speed" in steps
    assert steps.count("--trt") == 6
    assert (done.returncode, done.stderr) == (1, "gpu.sh: failed: python -m pytest -m gpu -rs\n")
