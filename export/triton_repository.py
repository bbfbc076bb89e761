"""A Triton model repository with one model, `dsd`: a model directory, and the files that make Triton host it.

    REPO/dsd/config.pbtxt   inputs, outputs, instances; parameters for engine, device, precision, limits
    REPO/dsd/1/model.py     names the class in dsd_serve that runs inside Triton
    REPO/dsd/model/         a copy of the model directory

Triton's Python needs this package with the extra of the engine; the image of the Dockerfile's target `triton` has it.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsd_serve.backends import task_messages
from dsd_serve.backends.task_messages import MODEL
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines import ENGINE_NAMES
from dsd_serve.errors import CheckpointError
from dsd_serve.precision import AUTO, REFERENCE
from export.commit import PREFIX, REJECTED, drafting, move

log = logging.getLogger(__name__)

DEVICES = {"gpu": "cuda", "cpu": "cpu"}  # as the engines call them
ENGINES = tuple(name for name in ENGINE_NAMES if name != "torch")
TYPES: dict[type[np.generic], str] = {
    np.uint8: "TYPE_UINT8",
    np.float32: "TYPE_FP32",
    np.float64: "TYPE_FP64",
    np.int64: "TYPE_INT64",
}

MODEL_PY = '''"""Triton's Python backend loads this file and makes one TritonPythonModel per instance."""

from dsd_serve.triton_instance import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    model_dir: Path, repository: Path, *, device: str = "gpu", engine: str = "onnx", precision: str = AUTO
) -> None:
    """Write the model `dsd` of a Triton model repository, or replace it.

    device: gpu, one instance on every GPU, or cpu, one instance. engine: onnx or tensorrt. Raises CheckpointError when
    the model directory is wrong, or has no graph of that precision.
    """
    directory = read_model_dir(model_dir)
    if engine == "onnx":
        directory.graph(REFERENCE if precision == AUTO else precision)  # raises CheckpointError if there is none
    elif not any(model_dir.glob("*.plan")):
        raise CheckpointError(f"{model_dir} has no TensorRT plan; make one: dsd-export {model_dir} --trt")
    if model_dir.resolve().is_relative_to((repository / MODEL).resolve()):
        raise CheckpointError(f"{model_dir} is inside {repository / MODEL}, which would be replaced; give its original")
    parameters = {
        "model": "model",  # relative to this file's folder
        "engine": engine,
        "device": DEVICES[device],
        "precision": precision,
        "threads": "0",
        "row_budget": "0",
        "max_waiting": "256",
        "max_wait": "60",
        "max_seconds": "300",
    }
    with drafting(repository) as draft:
        new = draft / MODEL
        shutil.copytree(model_dir, new / "model", ignore=shutil.ignore_patterns(f"{PREFIX}*", REJECTED))
        (new / "1").mkdir()
        (new / "1" / "model.py").write_text(MODEL_PY, encoding="utf-8")
        (new / "config.pbtxt").write_text(config_pbtxt(directory.config, device, parameters), encoding="utf-8")
        move([(repository / MODEL, draft / "replaced"), (new, repository / MODEL)])
    log.info("%s is a Triton model repository: tritonserver --model-repository=%s", repository, repository)


def config_pbtxt(config: ModelConfig, device: str, parameters: Mapping[str, str]) -> str:
    """The text of config.pbtxt."""
    inputs = [tensor(name, *kind, optional=True) for name, kind in task_messages.input_shapes(config).items()]
    outputs = [tensor(name, *kind) for name, kind in task_messages.output_shapes(config).items()]
    values = [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    kind = "KIND_GPU" if device == "gpu" else "KIND_CPU"
    return "\n".join(
        [
            "# Written by dsd-export. The form of requests: dsd_serve/backends/task_messages.py. Triton does not",
            "# batch, because every instance has a batcher of its own. The parameters may be changed by hand.",
            f'name: "{MODEL}"',
            'backend: "python"',
            "max_batch_size: 0",
            "model_transaction_policy { decoupled: true }",
            *inputs,
            *outputs,
            f"instance_group {{ kind: {kind} count: 1 }}" + (" # one on every GPU" if device == "gpu" else ""),
            *values,
            "",
        ]
    )


def tensor(name: str, dtype: type[np.generic], shape: tuple[int, ...], *, optional: bool = False) -> str:
    what, more = ("input", " optional: true") if optional else ("output", "")
    return f'{what} {{ name: "{name}" data_type: {TYPES[dtype]} dims: [ {", ".join(map(str, shape))} ]{more} }}'
