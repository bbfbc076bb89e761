"""Fixtures of all tests: generated images, a briefly trained small network, the demo model, real servers, a browser."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsd_serve.files import demo_model
from dsd_serve.imaging import codec
from tests.support.browser import chromium, visiting
from tests.support.data import REAL_DATA, ROOT, sample_image, train_arguments
from tests.support.models import FLOW_MAP, OWN, PLAIN, export_model
from tests.support.servers import Server, find_free_port


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once for all workers of pytest-xdist; the other workers wait for it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of each of three classes, in folders named by label and by wnid."""

    def make(folder: Path) -> None:
        for name, label in (("1", 1), ("n02099601", 207), ("950", 950)):
            (folder / name).mkdir()
            for number in range(12):
                (folder / name / f"{number}.png").write_bytes(codec.write_image(sample_image(label, number)))

    return made_once(tmp_path_factory, "images", make)


@pytest.fixture(scope="session")
def train_config(image_folder: Path) -> Callable[..., Any]:
    """Makes the configuration of a short run of the tiny network: train_config("optim.steps=3", ...)."""
    from training.run_config import load_config

    def make(*overrides: str) -> Any:
        return load_config(ROOT / "training/configs/demo.toml", train_arguments(image_folder, *overrides))

    return make


@pytest.fixture(scope="session")
def checkpoint(train_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny network after some steps."""
    from training.train import train

    def make(folder: Path) -> None:
        train(train_config("optim.steps=20", f"run.dir={folder}"))

    return made_once(tmp_path_factory, "run", make) / "checkpoint.pt"


@pytest.fixture(scope="session")
def tiny_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model directory of that checkpoint."""
    from export.main import main

    def make(folder: Path) -> None:
        arguments = [str(checkpoint), "-o", str(folder / "tiny")]
        main([*arguments, "--steps", "4", "--guidance", "1.5", "--store", "fp16"])

    return made_once(tmp_path_factory, "models", make) / "tiny"


@pytest.fixture(scope="session")
def own_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model directory of a network with three classes of its own, and guidance within an interval."""
    guidance = ("--guidance", "2", "--guidance-start", "0.25", "--guidance-stop", "0.8")
    return made_once(tmp_path_factory, "own", lambda folder: export_model(OWN, folder, *guidance)) / "model"


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model directory of a network without classes."""
    return made_once(tmp_path_factory, "plain", lambda folder: export_model(PLAIN, folder)) / "model"


@pytest.fixture(scope="session")
def flow_map_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model directory of a network with a flow map."""
    return made_once(tmp_path_factory, "flow-map", lambda folder: export_model(FLOW_MAP, folder)) / "model"


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return demo_model()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with Tiny-ImageNet and photos, from DSD_DATA; skips the test without it."""
    if not REAL_DATA.exists():
        pytest.skip(f"no real images: {REAL_DATA} is missing, set DSD_DATA")
    return REAL_DATA


@pytest.fixture(scope="session")
def server_url(tiny_dir: Path) -> Iterator[str]:
    """The URL of a real server process with the tiny model."""
    running = Server("--model", str(tiny_dir), "--max-images", "8", "--max-waiting", "64", "--max-body-mb", "2")
    yield running.url
    assert running.stop() == 0


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that returns ports on which nothing listens."""
    return find_free_port


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skipped test without it."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each as a new visitor: `visiting` has the arguments."""
    with visiting(browser) as visit:
        yield visit
