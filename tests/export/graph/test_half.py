"""Graphs in fewer bits: outputs, choice of the precision, and errors."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from benchmarks import network_memory
from dsd_serve.checkpoint import read_model_dir, read_weights
from dsd_serve.engines import load_engine, onnx_engine
from dsd_serve.engines.onnx_engine import INTEGER_PRODUCT
from dsd_serve.engines.selftest import batch_invariance, mixture
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.precision import check_runs
from dsd_serve.rows import OUTPUT_NAMES, inputs_of
from export.graph.half import HALVES, ISLANDS, PARTS, half_weights, to_half
from export.graph.int8 import int8_weights, scale_of
from export.graph.onnx_graph import Graph, block_products
from export.graph.weights import onnx_type, write_weights
from export.main import main
from export.verify import verify
from studies.precision_cost import as_on_a_gpu, images, numerics, psnr
from tests.support.data import ROOT
from tests.support.processor import has_int8, needs_int8
from tests.support.servers import Server

EXPORTED = ["fp16", "bf16", *(["int8"] if has_int8() else [])]


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory):
    """The tiny model, stored in fp32, in every precision."""
    target = tmp_path_factory.mktemp("precisions") / "tiny"
    main([str(checkpoint), "-o", str(target), "--precision", *EXPORTED])
    return target


@pytest.fixture(scope="module")
def demo_copy(demo_dir, tmp_path_factory):
    """The demo model in every precision."""
    target = tmp_path_factory.mktemp("precisions") / "demo"
    main([str(demo_dir), "-o", str(target), "--precision", *EXPORTED])
    return target


@pytest.fixture(scope="module")
def int8(directory):
    return load_engine("onnx", directory, precision="int8")


@needs_int8
def test_fp16_and_bf16_halve_the_weights_and_int8_quarters_the_products(directory):
    full = (directory / "model.safetensors").stat().st_size
    for precision in HALVES:
        assert (directory / f"model.{precision}.safetensors").stat().st_size < 0.52 * full  # headers are not halved
    products = block_products(onnx.load(directory / "model.onnx", load_external_data=False))
    assert len(products) == 7 * read_model_dir(directory).config.depth
    stored = load_file(directory / "model.int8.safetensors")
    assert {name for name, array in stored.items() if array.dtype == np.int8} == products


@pytest.mark.thorough
def test_weights_stored_in_fp16_lie_on_disk_once(demo_copy):
    assert not (demo_copy / "model.fp16.safetensors").exists()
    graph = onnx.load(demo_copy / "model.fp16.onnx", load_external_data=False).graph
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == {"model.safetensors"}


@pytest.mark.parametrize("precision", HALVES)
def test_half_graphs_keep_their_signature_and_multiply_in_half(directory, precision):
    file = directory / f"model.{precision}.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)).graph
    before = onnx.load(directory / "model.onnx", load_external_data=False).graph
    for ours, theirs in ((graph.input, before.input), (graph.output, before.output)):
        assert [(v.name, v.type.tensor_type.elem_type) for v in ours] == [
            (v.name, v.type.tensor_type.elem_type) for v in theirs
        ]
    assert tuple(v.name for v in graph.input) == tuple(one.name for one in inputs_of(read_model_dir(directory).config))
    assert tuple(v.name for v in graph.output) == OUTPUT_NAMES
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    kinds = [types[node.output[0]] for node in graph.node if node.op_type == "MatMul"]
    depth = read_model_dir(directory).config.depth
    assert kinds.count(onnx_type(precision)) == 9 * depth, "seven with weights, two of the attention"
    assert {types[node.output[0]] for node in graph.node if node.op_type in ("Pow", "ReduceMean")} == {1}


@pytest.mark.parametrize("precision", HALVES)
def test_half_graphs_for_onnx_runtime_attend_in_half_and_normalise_in_float32(directory, precision):
    """ONNX Runtime has these operators on CUDA in both types from 1.24 on."""
    graph = onnx.load(directory / f"model.{precision}.ort.onnx", load_external_data=False).graph
    to = {node.output[0]: a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute}
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    # A value is half if it is cast to half, or computed from a value that is.
    half = onnx_type(precision)
    halved: set[str] = {name for name, kind in stored.items() if kind == half}
    for node in graph.node:
        if to.get(node.output[0], half if halved.intersection(node.input) else None) == half:
            halved.update(node.output)
    depth = read_model_dir(directory).config.depth
    attentions = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
    norms = [node for node in graph.node if node.op_type == "SimplifiedLayerNormalization"]
    assert len(attentions) == depth
    assert all(set(node.input) <= halved for node in attentions)
    assert norms
    assert not [node for node in norms if halved.intersection(node.input)]


def test_bf16_weights_outside_the_products_are_fp16(directory):
    stored = load_file(directory / "model.safetensors")
    products = block_products(onnx.load(directory / "model.onnx", load_external_data=False))
    weights = half_weights(stored, "bf16", products)
    assert {weights[name].dtype.name for name in products} == {"bfloat16"}
    assert {array.dtype.name for name, array in weights.items() if name not in products} == {"float16"}


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-12, 4))
@settings(deadline=None, max_examples=40)
def test_int8_weights_are_within_half_a_step(seed, exponent):
    array = np.random.default_rng(seed).standard_normal((5, 7), dtype=np.float32) * np.float32(10.0**exponent)
    array[2] = 0
    stored = int8_weights({"w": array, "other": array[:1]}, {"w"})
    scale = stored[scale_of("w")]
    assert np.abs(stored["w"]).max() == 127
    assert (np.abs(stored["w"] * scale[:, None] - array) <= 0.5001 * scale[:, None]).all()


@needs_int8
def test_int8_is_near_float32_and_does_round(directory, int8):
    report = verify(int8, load_engine("onnx", directory), "int8")
    assert report.passed
    assert report.latent_rms > 1e-4


@needs_int8
@given(chosen=st.lists(st.integers(0, 15), min_size=1, max_size=24))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_int8_rows_do_not_depend_on_their_neighbours(int8, chosen):
    rows = mixture(int8.config, (4, 8, 4), seed=1)
    together = int8.run([rows[i] for i in chosen])
    for number, output in zip(chosen, together, strict=True):
        assert output.tobytes() == int8.run([rows[number]])[0].tobytes()


@needs_int8
def test_one_scale_for_the_whole_tensor_fails_the_self_test(directory, tmp_path):
    """The self-test must notice the usual int8 quantisation, with one scale for all rows of a call."""
    for file in directory.glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    proto = onnx.load(tmp_path / "model.int8.ort.onnx", load_external_data=False)
    for node in proto.graph.node:
        if node.op_type in ("ReduceMax", "ReduceMin"):
            node.input[1] = "everything"
            node.attribute[0].i = 1
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1], np.int64), "everything"))
    for node in list(proto.graph.node):
        if node.op_type == "Max":
            again = node.output[0]
            node.output[0] = f"{again}:one"
            spread = helper.make_node("Expand", [f"{again}:one", f"{again}:shape"], [f"{again}:all"])
            flat = helper.make_node("Reshape", [f"{again}:all", "int8:line"], [again])
            value = again.removesuffix(":size")
            count = helper.make_node("Shape", [f"{value}:flat"], [f"{again}:shape0"])
            first = helper.make_node("Slice", [f"{again}:shape0", "int8:0", "int8:1"], [f"{again}:rows"])
            ones = helper.make_node("Concat", [f"{again}:rows", "int8:1"], [f"{again}:shape"], axis=0)
            place = list(proto.graph.node).index(node) + 1
            for number, new in enumerate((count, first, ones, spread, flat)):
                proto.graph.node.insert(place + number, new)
    for name, value in (("int8:line", [-1]), ("int8:0", [0]), ("int8:1", [1])):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    (tmp_path / "model.int8.ort.onnx").write_bytes(proto.SerializeToString())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["artefacts"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = load_engine("onnx", tmp_path, precision="int8")
    assert not batch_invariance(wrong, mixture(wrong.config, (1, 2, 1), 0)).holds
    assert not verify(wrong, load_engine("onnx", directory), "int8").passed


def test_parts_are_found_and_every_part_exists(directory):
    graph = Graph(onnx.load(directory / "model.onnx", load_external_data=False))
    assert set(graph.parts.values()) == {*PARTS, "product"}
    depth = read_model_dir(directory).config.depth
    assert list(graph.parts.values()).count("softmax") == depth


@pytest.mark.thorough
def test_islands_lower_the_error(demo_dir, tmp_path):
    """With islands bf16 is several times closer to float32 than without; one for the softmax does not help."""
    model, reference = read_model_dir(demo_dir), load_engine("onnx", demo_dir)
    proto = onnx.load(demo_dir / "model.onnx", load_external_data=False)
    weights = tmp_path / "half.safetensors"
    write_weights(weights, half_weights(read_weights(demo_dir), "bf16", block_products(proto)))
    errors = {}
    for name, islands in {"chosen": ISLANDS, "all": frozenset(PARTS), "none": frozenset()}.items():
        with as_on_a_gpu(model, to_half(proto, "bf16", weights, islands), "bf16", weights) as engine:
            errors[name] = verify(engine, reference, "bf16").latent_rms
    print(errors)
    assert errors["none"] > 3 * errors["chosen"]
    assert errors["chosen"] < 1.05 * errors["all"]


@pytest.mark.parametrize(
    ("precision", "least"), [("fp16", 40), ("bf16", 25), pytest.param("int8", 20, marks=needs_int8)]
)
@pytest.mark.thorough
def test_images_after_fifty_steps(demo_copy, precision, least):
    model = read_model_dir(demo_copy)
    with numerics(model, precision) as engine:
        ours = images(engine, model, 5, 2)
    theirs = images(load_engine("onnx", demo_copy), model, 5, 2)
    values = [psnr(a, b) for a, b in zip(ours, theirs, strict=True)]
    print(precision, sorted(values))
    assert min(values) >= least


def test_fp16_runs_on_a_cpu(directory):
    engine = load_engine("onnx", directory, precision="fp16")
    assert engine.describe()["precision"] == "fp16"
    assert verify(engine, load_engine("onnx", directory), "fp16").passed


def test_impossible_combinations_get_a_sentence(directory, tiny_dir):
    for precision, named in (
        ("bf16", "runs bf16 on cuda, and the device is cpu; use --precision fp32, fp16 or int8, or --device cuda"),
        ("fp8", "must be one of fp32, fp16, bf16, int8, got 'fp8'"),
    ):
        with pytest.raises(EngineUnavailableError, match=named):
            load_engine("onnx", directory, precision=precision)
    with pytest.raises(
        CheckpointError, match=r"no graph in fp16, only in fp32; dsd-export \S+ --precision fp16 makes it"
    ):
        load_engine("onnx", tiny_dir, precision="fp16")
    with pytest.raises(EngineUnavailableError, match="int8"):
        load_engine("torch", directory, precision="int8")
    with pytest.raises(EngineUnavailableError, match="runs int8 on cpu, and the device is cuda:0; use"):
        check_runs("int8", "onnx", "cuda:0")


@needs_int8
def test_a_cpu_whose_products_overflow_is_rejected():
    """onnx builds the same bytes as the engine's constant; saturating sums, as on x86 without VNNI, are noticed."""
    tensors = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("y", TensorProto.INT32))
    ]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert model.SerializeToString() == INTEGER_PRODUCT

    class Saturating:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            pairs = inputs["a"].astype(int)[:, :, None] * inputs["b"].astype(int)
            return [np.minimum(pairs.reshape(16, 32, 2, 16).sum(2), 32767).sum(1)]

    onnx_engine.check_integers(onnx_engine.import_onnxruntime())
    with pytest.raises(EngineUnavailableError, match="sums of 8-bit products do not overflow"):
        onnx_engine.check_integers(type("ort", (), {"InferenceSession": Saturating}))


@needs_int8
def test_a_server_serves_a_precision_and_reports_it(directory):
    import httpx

    running = Server("--model", str(directory), "--precision", "int8")
    try:
        model = httpx.get(f"{running.url}/model").json()
        assert model["engine"]["precision"] == "int8"
        assert model["self_test"]["batch_invariant"]
        assert model["fingerprint"] != read_model_dir(directory).fingerprint()
        assert httpx.get(f"{running.url}/generate?class=207&seed=1&steps=2").status_code == 200
    finally:
        assert running.stop() == 0


def test_a_server_without_the_precision_names_the_command_that_makes_it(tiny_dir):
    command = [sys.executable, "-m", "server.main", "--model", str(tiny_dir), "--precision", "int8", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "has no graph in int8, only in fp32; dsd-export" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_graphs_split_by_role_compute_the_same_as_the_single_one(directory, tmp_path):
    graphs = network_memory.split(directory, tmp_path)
    one = network_memory.measure(directory, [directory / "model.ort.onnx"], {})
    three = network_memory.measure(directory, graphs, {})
    assert one["outputs"] == three["outputs"]
    assert len(one["outputs"]) == 3
