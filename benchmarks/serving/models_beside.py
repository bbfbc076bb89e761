"""Images/s of models over HTTP, in turns: python -m benchmarks.serving.models_beside FAST 'TEACHER?steps=4' TEACHER

Each argument is a model directory and, after a question mark, settings that replace those it recommends, as in the API.
Each has a server with one engine thread. 16 connections of this process keep one server after the other busy, round by
round, so that a moment in which the machine was busy hits all of them. They send and read bytes without a client
library, which would take as much processor time as the server. Prints the medians of the rounds: images/s, the time of
the server's processor for an image, and both as a ratio to the last argument.
"""

import argparse
import asyncio
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.serving.overload import start
from benchmarks.serving.tables import cpu_seconds
from dsd_serve.client import Client
from dsd_serve.errors import DSDError

CONNECTIONS = 16
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass
class Measured:
    """One model: its server, the query string of its images, and the rates (images/s) and processor times (s per image)
    of its rounds."""

    title: str
    query: str
    port: int
    pid: int
    classes: Sequence[int]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def round(self, images: int) -> None:
        before, began = cpu_seconds(self.pid), time.perf_counter()
        asyncio.run(self.draw(images))
        self.rates.append(images / (time.perf_counter() - began))
        self.costs.append((cpu_seconds(self.pid) - before) / images)

    async def draw(self, images: int) -> None:
        seeds = iter(range(images))
        await asyncio.gather(*[self.connection(seeds) for _ in range(CONNECTIONS)])

    async def connection(self, seeds: Iterator[int]) -> None:
        """Request images one after the other, on one connection, until there are no more seeds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for seed in seeds:
            path = f"/generate?class={self.classes[seed % len(self.classes)]}&seed={seed}&{self.query}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if not head.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"models_beside: {self.title}: {body.decode(errors='replace')}")
        writer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.models_beside", description=__doc__.split("\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[?SETTINGS]")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=192, help="images of a round")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        measured = []
        for model in options.models:
            directory, _, query = model.partition("?")
            process, url = start(["--model", directory, "--threads", "1"])
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            with Client(url) as client:
                classes = client.model()["classes"]
            measured.append(Measured(model, query, int(url.rpartition(":")[2]), process.pid, classes))
        for one in measured:  # warms up
            one.round(options.images)
            one.rates.clear()
            one.costs.clear()
        for _ in range(options.rounds):
            for one in measured:
                one.round(options.images)
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
