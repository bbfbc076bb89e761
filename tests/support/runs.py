"""Training runs of tests: started, stopped at a step, compared."""

import json
import os
import signal
import subprocess
import sys

import torch

from dsd_serve.checkpoint import read_checkpoint
from tests.support.data import ROOT


def tensors(values):
    """All tensors of a checkpoint by path."""
    found = {}

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}/{key}")

    walk(values, "")
    return found


def assert_same(one, other):
    a, b = tensors(read_checkpoint(one)), tensors(read_checkpoint(other))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def train_until(config, last):
    """Train until a SIGTERM after step `last`."""
    from training import train as module

    steps = []
    original = module.train_step

    def counted(state, *rest):
        result = original(state, *rest)
        steps.append(state.step)
        if state.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    module.train_step = counted
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.train(config)
    finally:
        module.train_step = original
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert steps[-1] == last


def launch(processes, arguments, folder, **options):
    """Start dsd-train; under torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "training", "training/configs/demo.toml", *arguments]
    return subprocess.Popen(
        [*command, f"run.dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **options},
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    """(step, loss, gradient norm) of every line of the journal that has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
