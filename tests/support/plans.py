"""Plans of the double of TensorRT, with the manifests that the engine reads."""

import dataclasses
import json

from dsd_serve.checkpoint import sha256
from dsd_serve.engines.plan import Manifest, manifest_path, plan_path
from dsd_serve.precision import PRECISIONS
from export.tensorrt import checks
from tests.support.gpu_double import TensorRT

LAYERS = json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]})
PASSED = {name: {"passed": True, "text": ""} for name in checks.NAMES}


def put_plan(directory, **changes):
    """A plan of the double, and a manifest of it."""
    graph = directory / PRECISIONS["fp32"].plain
    plan = plan_path(directory, "fp32")
    plan.write_text(str(graph))
    manifest = Manifest(
        precision="fp32",
        made_from={name: sha256(directory / name) for name in (graph.name, "model.safetensors")},
        library="tensorrt",
        library_version=TensorRT.__version__,
        dsd_version="0.1.0",
        rows=(0, 8, 64),
        gpu="Double 1",
        capability="9.0",
        plan=sha256(plan),
        checks=PASSED,
    )
    manifest_path(plan).write_text(dataclasses.replace(manifest, **changes).to_json())
    return plan
