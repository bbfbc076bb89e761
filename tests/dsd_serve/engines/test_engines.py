"""Every engine is the same network; on the CPU a row's bits do not depend on its neighbours."""

import ctypes
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd_serve.engines import load_engine, onnx_engine
from dsd_serve.engines.onnx_engine import OnnxEngine, check_assignment, choose_provider
from dsd_serve.errors import CheckpointError, EngineUnavailableError, InputError
from dsd_serve.imaging import codec
from dsd_serve.rows import OUTPUT_NAMES, Decode, Denoise, Encode, collate
from export.verify import mixture, verify


@pytest.fixture(scope="module", params=["tiny_dir", "demo_dir", "flow_map_dir"])
def model_dir(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(model_dir):
    return load_engine("onnx", model_dir)


@pytest.fixture(scope="module")
def pool(engine):
    """Rows of all kinds, and the output of each alone."""
    rows = mixture(engine.config, (4, 8, 4), seed=1)
    return rows, [engine.run([row])[0] for row in rows]


@given(chosen=st.lists(st.integers(0, 15), min_size=1, max_size=24))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_alone_and_in_any_mixture_is_bit_identical(engine, pool, chosen):
    rows, alone = pool
    for number, output in zip(chosen, engine.run([rows[i] for i in chosen]), strict=True):
        assert output.tobytes() == alone[number].tobytes()


def test_the_result_does_not_depend_on_the_number_of_threads(model_dir, pool):
    rows, alone = pool
    single = OnnxEngine.load(model_dir, num_threads=1)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(single.run(rows), alone, strict=True))


def test_bound_memory_gives_the_same_bits(engine, monkeypatch):
    """The memory binding used on CUDA, here on the CPU: kept for each combination of row counts, up to a limit."""
    monkeypatch.setattr(onnx_engine, "MOST_BINDINGS", 3)
    bound = onnx_engine.BoundSession(engine.session, engine.config, "cpu")
    for seed, counts in enumerate([(1, 0, 0), (0, 3, 0), (2, 3, 1), (0, 3, 0), (0, 1, 1), (0, 0, 2), (1, 0, 0)]):
        inputs = collate(mixture(engine.config, counts, seed), engine.config)
        expected = engine.session.run(OUTPUT_NAMES, inputs)
        for ours, theirs in zip(bound.run(inputs), expected, strict=True):
            assert ours.tobytes() == theirs.tobytes()
            assert ours.shape == theirs.shape
    assert list(bound.known) == [(0, 1, 1), (0, 0, 2), (1, 0, 0)]


def test_onnx_agrees_with_torch(model_dir, engine):
    report = verify(engine, load_engine("torch", model_dir))
    print(report)
    assert report.passed


def test_onnx_agrees_with_torch_on_real_images(demo_dir, real_data):
    """Encode, denoise and decode rows of the demo model, from photographs: 1e-4 on latents, 1 grey level on pixels."""
    ours, reference = load_engine("onnx", demo_dir), load_engine("torch", demo_dir)
    photos = [codec.fit(codec.read_image(path.read_bytes()), 32) for path in sorted(real_data.glob("photos/*.jpg"))]
    assert len(photos) >= 40
    encode = [Encode(pixels) for pixels in photos]
    latents = reference.run(encode)
    noise = np.random.default_rng(0).standard_normal((len(latents), *latents[0].shape), dtype=np.float32)
    label = ours.config.trained_classes[0]
    denoise = [Denoise(0.6 * z + 0.4 * n, 0.6, label) for z, n in zip(latents, noise, strict=True)]
    for rows, limit in ((encode, 1e-4), (denoise, 1e-4), ([Decode(z) for z in latents], 1)):
        pairs = zip(ours.run(rows), reference.run(rows), strict=True)
        error = max(np.abs(a.astype(float) - b.astype(float)).max() for a, b in pairs)
        print(type(rows[0]).__name__, error)
        assert error <= limit


def test_outputs_have_the_promised_shapes(engine):
    config = engine.config
    for row, output in zip(rows := mixture(config, (1, 1, 1), 0), engine.run(rows), strict=True):
        shape, dtype = (config.pixel_shape, "uint8") if isinstance(row, Decode) else (config.latent_shape, "float32")
        assert (output.shape, output.dtype) == (shape, dtype)


def test_rows_of_the_wrong_shape_are_named(engine):
    with pytest.raises(InputError, match=r"encode row must be uint8 \[3, (16|32), (16|32)\], got uint8 \[3, 5, 5\]"):
        engine.run([Encode(np.zeros((3, 5, 5), np.uint8))])


def test_there_is_no_fallback_to_another_engine(model_dir):
    with pytest.raises(EngineUnavailableError, match="onnxruntime-gpu"):
        load_engine("onnx", model_dir, device="cuda")
    with pytest.raises(EngineUnavailableError, match="cannot use device 'cuda:7'"):
        load_engine("torch", model_dir, device="cuda:7")
    with pytest.raises(EngineUnavailableError, match="must be cpu"):
        load_engine("onnx", model_dir, device="tpu")
    with pytest.raises(EngineUnavailableError, match="onnx, torch"):
        load_engine("tensorflow", model_dir)


def test_broken_files_are_named(tiny_dir, tmp_path):
    for file in tiny_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny_dir / "model.safetensors").read_bytes()[:-100])
    for engine in ("onnx", "torch"):
        with pytest.raises(CheckpointError, match=r"model.safetensors is not the file that config.json was"):
            load_engine(engine, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["artefacts"]  # like older directories
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.ort.onnx cannot be loaded"):
        load_engine("onnx", tmp_path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_engine("torch", tmp_path)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.ort.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.onnx"):
        load_engine("onnx", tmp_path)


def test_serving_imports_no_torch():
    """The server's module and an ONNX engine, in a process where torch cannot be imported."""
    code = (
        "import sys; sys.modules.update({'torch': None, 'onnx': None, 'safetensors': None})\n"
        "import server.app, server.settings, dsd_serve.files\n"
        "from dsd_serve.engines import load_engine\n"
        "load_engine('onnx', dsd_serve.files.demo_model())\n"
        "try: load_engine('torch', dsd_serve.files.demo_model())\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "engine 'torch' needs torch" in done.stdout


def test_without_onnxruntime_an_error_says_what_to_install():
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from dsd_serve.engines import load_engine\n"
        "from dsd_serve.files import demo_model\n"
        "load_engine('onnx', demo_model())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install '.[cpu]'" in done.stderr


def test_without_a_driver_an_error_says_so_and_onnx_runtime_does_not_fall_back(monkeypatch):
    gpu_build = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"], preload_dlls=lambda: None)

    def load(name):
        if name == "libcuda.so.1" and not has_driver:
            raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(sys, "platform", "linux")
    has_driver = False
    with pytest.raises(EngineUnavailableError, match=r"device 'cuda:1' needs an NVIDIA GPU and its driver \(libcuda"):
        choose_provider(gpu_build, "cuda:1")
    has_driver = True
    provider, options = choose_provider(gpu_build, "cuda:1")
    assert (provider, options["device_id"], options["use_tf32"]) == ("CUDAExecutionProvider", "1", "0")


class Assigned:
    """A session of which some nodes run elsewhere."""

    def __init__(self, *ops):
        nodes = [SimpleNamespace(op_type=op) for op in ops]
        on_gpu = SimpleNamespace(ep_name="CUDAExecutionProvider", get_nodes=lambda: [SimpleNamespace(op_type="MatMul")])
        self.parts = [on_gpu, SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]

    def get_provider_graph_assignment_info(self):
        return self.parts


def test_nodes_that_run_on_the_cpu_instead_of_the_gpu_are_noticed(tiny_dir, caplog):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    graph = str(tiny_dir / "model.ort.onnx")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailableError, match="would run MatMul, MultiHeadAttention on the CPU and not by CUDA"):
        check_assignment(session, "CUDAExecutionProvider")
    check_assignment(session, "CPUExecutionProvider")
    check_assignment(Assigned("Shape", "Gather", "Concat"), "CUDAExecutionProvider")
    assert not caplog.records
    check_assignment(Assigned("Shape", "Sigmoid"), "CUDAExecutionProvider")
    assert "runs Sigmoid on the CPU" in caplog.text
