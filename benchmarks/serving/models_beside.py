"""Images/s of models over HTTP, in turns: python -m benchmarks.serving.models_beside FAST 'TEACHER?steps=4' TEACHER

Each argument is a model directory and, after a question mark, settings that replace those it recommends. There is one
server with one engine thread for each; 16 clients of this process ask one server after the other, round by round, so
that a moment in which the machine was busy hits all of them. Prints the medians of the rounds: images/s, the time of
the server's processor for an image, and both as a ratio to the last argument.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from benchmarks.serving.overload import start
from benchmarks.serving.tables import cpu_seconds
from dsd_serve.client import Client
from dsd_serve.errors import DSDError

CLIENTS = 16


@dataclass
class Measured:
    """One model: its server, and the rates (images/s) and processor times (s per image) of its rounds."""

    title: str
    client: Client
    pid: int
    settings: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def round(self, pool: ThreadPoolExecutor, images: int) -> None:
        classes = self.client.model()["classes"]
        before, began = cpu_seconds(self.pid), time.perf_counter()

        def draw(seed: int) -> bytes:
            return self.client.generate(classes[seed % len(classes)], seed=seed, **self.settings)

        list(pool.map(draw, range(images)))
        self.rates.append(images / (time.perf_counter() - began))
        self.costs.append((cpu_seconds(self.pid) - before) / images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.models_beside", description=__doc__.split("\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[?SETTINGS]")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=96, help="images of a round")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(CLIENTS) as pool:
        measured = []
        for model in options.models:
            directory, _, settings = model.partition("?")
            process, url = start(["--model", directory, "--threads", "1"])
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            client = stack.enter_context(Client(url))
            given = {name: json.loads(text) if text[:1].isdigit() else text for name, text in parse_qsl(settings)}
            measured.append(Measured(model, client, process.pid, given))
        for number in range(options.rounds + 1):
            for one in measured:
                one.round(pool, options.images)
                if number == 0:  # the first round warms up
                    one.rates.clear()
                    one.costs.clear()
    last = measured[-1]
    print("| model | images/s | processor time, ms per image | images/s, ratio | processor time, ratio |")
    print("| --- | --- | --- | --- | --- |")
    for one in measured:
        rate = statistics.median(a / b for a, b in zip(one.rates, last.rates, strict=True))
        cost = statistics.median(a / b for a, b in zip(one.costs, last.costs, strict=True))
        print(
            f"| {one.title} | {statistics.median(one.rates):.0f} | {1000 * statistics.median(one.costs):.2f} | "
            f"{rate:.2f} | {cost:.2f} |"
        )


if __name__ == "__main__":
    try:
        main()
    except (DSDError, OSError) as error:
        sys.exit(f"models_beside: {error}")
