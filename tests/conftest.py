"""What tests share: small pictures made by code, a small trained-for-a-moment network, the demo model, real servers."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dsd_serve.imaging import codec
from server.settings import demo_model

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("DSD_DATA", ROOT.parent / "shared" / "data"))
CLASSES = (1, 207, 950)

# The smallest network that still has every part.
TINY = ["model.image_size=16", "model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.latent_dim=8"]


def picture(label: int, number: int, size: int = 24) -> np.ndarray:
    """A picture with a colour and a stripe that depend on its label, and some noise: uint8 [3, size, size]."""
    rng = np.random.default_rng([label, number])
    pixels = np.full((3, size, size), 40, np.int64)
    pixels[label % 3] += 120
    pixels[:, :, rng.integers(size) :] += 40
    return np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of each of three classes, in folders named by label and by wnid."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, label in (("1", 1), ("n02099601", 207), ("950", 950)):
        (folder / name).mkdir()
        for number in range(12):
            (folder / name / f"{number}.png").write_bytes(codec.write_image(picture(label, number)))
    return folder


@pytest.fixture(scope="session")
def train_config(picture_folder: Path) -> Callable[..., Any]:
    """Makes the configuration of a short run of the tiny network: train_config("optim.steps=3", ...)."""
    from training.run_config import load_config

    def make(*overrides: str) -> Any:
        return load_config(ROOT / "training/configs/demo.toml", train_arguments(picture_folder, *overrides))

    return make


def train_arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        *TINY,
        f"data.path={folder}",
        f"data.validation={folder}",
        f"data.classes={list(CLASSES)}",
        "optim.batch_size=8",
        "optim.micro_batch_size=4",
        "optim.warmup_steps=2",
        "run.compile=off",
        "run.device=cpu",
        "run.eval_images=8",
        "run.samples_per_class=1",
        "run.sample_steps=2",
        *overrides,
    ]


@pytest.fixture(scope="session")
def checkpoint(train_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny network after some steps."""
    from training.train import train

    folder = tmp_path_factory.mktemp("run")
    train(train_config("optim.steps=20", f"run.dir={folder}"))
    return folder / "checkpoint.pt"


@pytest.fixture(scope="session")
def tiny_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory that dsd-export writes of it."""
    from export.main import main

    target = tmp_path_factory.mktemp("models") / "tiny"
    main([str(checkpoint), "-o", str(target), "--steps", "4", "--guidance", "1.5", "--store", "fp16"])
    return target


def has_int8() -> bool:
    """Whether this machine computes int8 right: x86 without VNNI does not, and the engine refuses it there."""
    from dsd_serve.engines import onnx_engine
    from dsd_serve.errors import EngineUnavailableError

    try:
        onnx_engine.check_integers(onnx_engine.import_onnxruntime())
    except EngineUnavailableError:
        return False
    return True


needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU adds 8-bit products wrongly (x86 without VNNI)")


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return demo_model()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Tiny-ImageNet and photos, where the machine has them; DSD_DATA says where."""
    if not REAL_DATA.exists():
        pytest.skip(f"no real pictures: {REAL_DATA} is not there, set DSD_DATA")
    return REAL_DATA


class Running:
    """A dsd-serve process and its address."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "server.main", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})}
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            line = self.process.stderr.readline()
            self.lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                return
            if not line:
                break
        self.process.kill()
        raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture(scope="session")
def server_url(tiny_dir: Path) -> Iterator[str]:
    """A real server of the tiny model in a process of its own."""
    running = Running("--model", str(tiny_dir), "--max-images", "8", "--max-waiting", "64", "--max-body-mb", "2")
    yield running.url
    assert running.stop() == 0


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives ports that nobody listens on."""

    def find() -> int:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return int(found.getsockname()[1])

    return find
