"""The row budget after starts on a busy machine: python -m benchmarks.busy_start [--starts 8] [--hogs 2]

Each start loads the model beside hogs, processes that compute all the time, and measures its budget. Then the hogs end
and it draws many images at once, while the budget may move. A line of the output is a start: its budget, and at equal
intervals afterwards the budget and the images/s since the one before.
"""

import argparse
import itertools
import multiprocessing
import time
from pathlib import Path

from dsd_serve.files import demo_model
from dsd_serve.loading import load
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate

PARTS = 5  # intervals
TASK = SamplingParams(num_steps=8, guidance_scale=2.0)


def hog() -> None:
    """Compute until killed."""
    while True:
        sum(range(10_000))


def start(model_dir: Path, hogs: int, seconds: float, keep_hogs: bool) -> str:
    """One start, as a line of the output."""
    spawn = multiprocessing.get_context("spawn")
    busy = [spawn.Process(target=hog, daemon=True) for _ in range(hogs)]
    for process in busy:
        process.start()
    try:
        time.sleep(1)
        with load(model_dir) as model:
            if not keep_hogs:
                stop(busy)
            words = [f"{model.backend.budget:3d}"]
            tasks = itertools.repeat(Generate(model.info.config.drawable_labels[0], TASK))
            done, since = 0, time.monotonic()
            results = model.results(tasks)
            for _ in results:
                done += 1
                if (now := time.monotonic()) >= since + seconds / PARTS:
                    words.append(f"{model.backend.budget:3d} {done / (now - since):6.1f}")
                    done, since = 0, now
                    if len(words) > PARTS:
                        break
            results.close()
    finally:
        stop(busy)
    return "   ".join(words)


def stop(processes: list[multiprocessing.context.SpawnProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy_start", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=demo_model(), help="model directory (default: the demo model)")
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--hogs", type=int, default=2, help="processes that compute beside each start (2)")
    parser.add_argument("--keep-hogs", action="store_true", help="they go on while the images are drawn")
    parser.add_argument("--seconds", type=float, default=10.0, help="of drawing after each start (10)")
    options = parser.parse_args()
    print(f"budget at the start, then budget and images/s every {options.seconds / PARTS:g} s", flush=True)
    for _ in range(options.starts):
        print(start(options.model, options.hogs, options.seconds, options.keep_hogs), flush=True)


if __name__ == "__main__":
    main()
