"""The serving benchmark: this server and alternatives under load, in turns in one run (python -m benchmarks.serving).

With real networks, or with --simulated on a simulated accelerator; each has its own section in the document.
"""

import argparse
import contextlib
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.serving.contestants import BenchError, Contestant, Running
from benchmarks.serving.load import Summary
from benchmarks.serving.tables import Result, describe_machine, describe_versions, now, replace_section, section
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError, DSDError
from dsd_serve.files import demo_model

NAMES = ("ours", "litserve", "fastapi", "diffusers")
BATCH_SIZES = {False: (1, 2, 4, 8), True: (32, 64)}  # of LitServe; by whether the accelerator is simulated
BATCH_TIMEOUT = {False: 0.005, True: 0.010}
RESOLUTION = 0.05  # of the search for the highest sustained load, as a fraction of the reference capacity


def contestants(names: Sequence[str], simulated: bool) -> dict[str, list[Contestant]]:
    """The contestants of these names, ours first; LitServe with several batch sizes."""
    everyone = {
        "ours": [Contestant("ours", "ours", 128)],
        "litserve": [
            Contestant(
                f"LitServe, max_batch_size {size}",
                "litserve_batched",
                128 if simulated else 32,
                ("--max-batch-size", str(size), "--batch-timeout", str(BATCH_TIMEOUT[simulated])),
            )
            for size in BATCH_SIZES[simulated]
        ],
        "fastapi": [Contestant("FastAPI, one at a time" + ("" if simulated else ", torch eager"), "fastapi_loop", 4)],
    }
    return {name: everyone[name] for name in everyone if name in names}


def highest_sustained(sustained: Callable[[float], bool], known: dict[float, bool], ceiling: float) -> float:
    """The highest fraction of the reference capacity that is sustained, by bisection; 0 below the resolution.

    known: fractions measured so far. ceiling: an upper bound, above the highest throughput.
    """
    failed = min((f for f, kept in known.items() if not kept), default=math.inf)
    kept = max((f for f, kept in known.items() if kept and f < failed), default=0.0)
    failed = min(failed, max(ceiling, kept))
    while failed - kept > RESOLUTION:
        middle = (failed + kept) / 2
        if sustained(middle):
            kept = middle
        else:
            failed = middle
    return kept


class Bench:
    """One run: its settings and running servers."""

    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.seconds, self.warmup, self.loads = options.seconds, min(3.0, options.seconds / 3), sorted(options.loads)
        self.model, self.simulated = options.model, options.simulated
        self.classes = read_model_dir(self.model).config.trained_classes
        if not self.classes:
            raise CheckpointError(f"the benchmark draws classes with guidance, and {self.model} has no classes")
        self.stack, self.start_time = stack, time.monotonic()

    def log(self, text: str) -> None:
        print(f"{time.monotonic() - self.start_time:6.1f} s  {text}", file=sys.stderr, flush=True)

    def start(self, contestant: Contestant) -> Running:
        return self.stack.enter_context(Running(contestant, self.model, self.simulated, self.classes))

    def offline(self, running: Running) -> float:
        """The highest throughput of a server, in images/s."""
        contestant = running.contestant
        answer = running.measure("closed", self.seconds, self.warmup, clients=contestant.clients)
        self.log(f"{contestant.label}: {answer['rate']:.1f} images/s saturated")
        return answer["rate"]

    def best(self, candidates: Sequence[Contestant]) -> tuple[list[tuple[Running, Result]], list[tuple[str, float]]]:
        """The fastest candidate (all of them on a simulated accelerator), and the rates of the others."""
        servers = [self.start(candidate) for candidate in candidates]
        tried = [Result(running.contestant.label, self.offline(running)) for running in servers]
        kept = tried if self.simulated else [max(tried, key=lambda result: result.offline)]
        field = []
        for running, result in zip(servers, tried, strict=True):
            if result in kept:
                field.append((running, result))
            else:
                running.stop()
        return field, [(result.label, result.offline) for result in tried if result not in kept]

    def poisson(self, running: Running, result: Result, fraction: float, capacity: float) -> Summary:
        summary = running.poisson(fraction * capacity, self.seconds, self.warmup)
        kept = "sustained" if summary.sustained else "not sustained"
        self.log(
            f"{result.label}: {fraction:.1%}, p95 {1000 * summary.p95:.0f} ms, of 10 steps "
            f"{1000 * summary.short_p95:.0f} ms, {summary.lost} of {summary.offered} lost, {kept}"
        )
        return summary

    def sustains(self, running: Running, result: Result, capacity: float, fraction: float) -> bool:
        return self.poisson(running, result, fraction, capacity).sustained

    def under_load(self, field: Sequence[tuple[Running, Result]], capacity: float) -> None:
        """Measure the requested loads, in turns, and then the highest load that each server sustains."""
        for fraction in self.loads:
            for running, result in field:
                if all(summary.sustained for summary in result.loads.values()):
                    result.loads[fraction] = self.poisson(running, result, fraction, capacity)
        for running, result in field:
            known = {fraction: summary.sustained for fraction, summary in result.loads.items()}
            sustained = partial(self.sustains, running, result, capacity)
            highest = highest_sustained(sustained, known, 1.1 * result.offline / capacity)
            # A run is too short to show a small overload, but no server sustains more than its highest throughput.
            result.highest = min(highest * capacity, result.offline)


def run(options: argparse.Namespace) -> str:
    """Run all measurements; the report. The reference capacity is the throughput of the first contestant."""
    about = {
        "machine": describe_machine(),
        "date": now(),
        "versions": describe_versions(),
        "command": f"`{shlex.join(['python', '-m', 'benchmarks.serving', *options.given])}`",
    }
    field: list[tuple[Running, Result]] = []
    tried: list[tuple[str, float]] = []
    reference: dict[str, Any] | None = None
    with contextlib.ExitStack() as stack:
        bench = Bench(options, stack)
        about["model"] = read_model_dir(options.model).name
        for candidates in contestants(options.contestants, options.simulated).values():
            kept, others = bench.best(candidates)
            field += kept
            tried += others
        if "ours" in options.contestants:
            about["row budget"] = f"{field[0][0].row_budget()}, measured by our server at startup"
        capacity = field[0][1].offline
        for running, result in field:
            result.single = running.measure("single", 0.3 * bench.seconds, 0.0)["p50"]
        if "diffusers" in options.contestants and not options.simulated:
            reference = measure_reference(options.model, bench.seconds / 2)
            bench.log(f"diffusers: {reference['rate']:.1f} images/s")
        bench.under_load(field, capacity)
        again = bench.offline(field[0][0])
        about["reference capacity"] = (
            f"{capacity:.1f} images/s, the throughput of {field[0][1].label}; at the end {again:.1f}"
        )
        about["duration"] = f"{time.monotonic() - bench.start_time:.0f} s, {options.seconds:g} s per measurement"
    return section(about, capacity, [result for _, result in field], tried, reference)


def measure_reference(model: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.serving.reference", str(model), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"the diffusers reference failed: {done.stderr[-2000:].strip()}")
    return json.loads(done.stdout)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--simulated", action="store_true", help="a simulated accelerator in place of the network")
    parser.add_argument("--seconds", type=float, default=12.0, help="duration of one measurement under load")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="fractions of the reference capacity"
    )
    parser.add_argument("--model", type=Path, default=demo_model(), help="a model directory (default: the demo model)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    options.given = list(arguments)
    if options.contestants == ["diffusers"]:
        parser.error("diffusers is an offline reference; name at least one server too")
    if options.seconds < 1:
        parser.error(f"--seconds must be 1 or more, got {options.seconds:g}")
    if min(options.loads) <= 0:
        parser.error(f"--loads must be above 0, got {min(options.loads):g}")
    needed = {"litserve": "litserve", "diffusers": "diffusers", "fastapi": "torch"}
    for name in options.contestants:
        module = needed.get(name)
        if module and not (options.simulated and name != "litserve") and find_spec(module) is None:
            parser.error(f"contestant {name} needs {module}: pip install '.[bench,train]' -c constraints.txt")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    # SystemExit runs the exit handlers, which stop the servers: they are in process groups of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))
    try:
        body = run(options)
    except (BenchError, DSDError) as error:
        sys.exit(f"bench: {error}")
    replace_section(options.output, "simulated" if options.simulated else "real", body)
    print(body)


if __name__ == "__main__":
    main(sys.argv[1:])
