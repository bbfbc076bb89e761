"""A model directory with a plan, and the TensorRT engine on a simulated GPU."""

import shutil

import pytest

from dsd_serve.engines import load_engine, tensorrt_engine
from export.tensorrt import plans as plan_export
from tests.support.gpu_double import Cuda, TensorRT
from tests.support.plans import LAYERS, put_plan


@pytest.fixture
def directory(tiny_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(tiny_dir, target)
    put_plan(target)
    return target


@pytest.fixture
def cuda(monkeypatch):
    """A GPU, and a TensorRT for it."""
    cuda = Cuda()
    trt = TensorRT(cuda, LAYERS)
    for module in (tensorrt_engine, plan_export):
        monkeypatch.setattr(module, "import_runtime", lambda: cuda)
        monkeypatch.setattr(module, "import_library", lambda name: trt)
    return cuda


@pytest.fixture
def engine(directory, cuda):
    return load_engine("tensorrt", directory, "cuda")
