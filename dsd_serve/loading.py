"""Loading of a model directory: its engine is tested and warmed up, and its batcher started."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.batcher import Batcher
from dsd_serve.checkpoint import ModelDir, check_regular, read_model_dir, read_text
from dsd_serve.class_images import FILE, MAX_BYTES, ClassImages
from dsd_serve.engines import choose_precision, load_engine
from dsd_serve.engines.selftest import self_test
from dsd_serve.errors import CheckpointError
from dsd_serve.files import demo_model
from dsd_serve.hub import model_dir
from dsd_serve.model import Model
from dsd_serve.precision import AUTO, REFERENCE
from dsd_serve.rows import Engine


def load(
    model: str | Path | None = None,
    engine: Engine | str = "onnx",
    *,
    device: str = "cpu",
    precision: str = AUTO,
    threads: int = 0,
    row_budget: int = 0,
    max_waiting: int = 1_000_000,
    max_seconds: float = math.inf,
    observer: Observer | None = None,
) -> Model:
    """Load a model directory, test its engine, warm it up, and start its batcher.

    model: a model directory or hf:org/name[@revision]; by default the demo model. engine: onnx, torch or tensorrt, or a
    loaded one. device: cpu, cuda or cuda:N. precision: one that the model was exported in, or auto: fp16 on a GPU if
    the model has it, else fp32. threads: of the CPU, 0 for all cores. row_budget: maximum number of rows in one call of
    the engine; 0 measures the best number. max_waiting, max_seconds: limits of the queue, see `Batcher`. Raises
    CheckpointError when the directory is wrong, EngineUnavailableError when the engine cannot run here.
    """
    path = demo_model() if model is None else model_dir(model)

    def open_it() -> Model:
        directory = read_model_dir(path)
        loaded, chosen = engine, REFERENCE if precision == AUTO else precision
        if isinstance(loaded, str):
            chosen = choose_precision(directory, loaded, device, precision)
            loaded = load_engine(loaded, path, device, threads, flush_denormals=True, precision=chosen)
        try:
            tested = self_test(loaded)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        batcher = Batcher(
            loaded, budget=row_budget, max_waiting=max_waiting, max_seconds=max_seconds, observer=observer
        )
        card = path / "card.md"
        info = ModelInfo(
            directory.name,
            loaded.config,
            directory.defaults,
            directory.fingerprint(chosen),
            {key: str(value) for key, value in loaded.describe().items()},
            tested,
            batcher.budget,
            read_text(card) if card.exists() else None,
            int((path / "config.json").stat().st_mtime),
            read_class_images(directory),
        )
        return Model(batcher, info)

    # In a thread of its own, because flushing denormals applies to the whole thread.
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(open_it).result()
        except OSError as error:
            raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise CheckpointError(f"the network of {path} needs more memory than is free") from None


def read_class_images(directory: ModelDir) -> ClassImages | None:
    """classes.webp of a model directory, checked. Raises CheckpointError, OSError if it is missing."""
    if directory.class_images is None:
        return None
    file = directory.path / FILE
    check_regular(file)
    if (size := file.stat().st_size) > MAX_BYTES:
        raise CheckpointError(f"{file} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    directory.check([file])
    return ClassImages.of(directory.class_images, file.read_bytes())
