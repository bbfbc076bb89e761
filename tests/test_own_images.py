"""From folders of images to every way of asking for one, by the commands that a person types: names in any script."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import dsd_serve
from dsd_serve.errors import InputError
from dsd_serve.imaging.codec import read_image, write_image
from tests.support.answers import IMAGENET
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]  # the first test waits for the commands of its fixtures

NAMES = ("Café", "Grandma's cat", "金毛犬")  # in the order in which a model has them
SIZE = 64
TINY = ["model.depth=1", "model.hidden_size=48", "model.num_heads=2", "run.compile=off", "run.device=cpu"]
FEW = ["optim.steps=2", "optim.warmup_steps=1", "run.eval_every=2", "run.samples_per_class=1", "run.sample_steps=1"]
QUICK = {"seed": 1, "steps": 2}
PAGES = (
    *("/", "/config", "/gradio_api/info", "/openapi.json", "/docs", "/model", "/model/card", "/classes", "/v1/models"),
    *("/metrics", "/debug/batcher", "/health/ready"),
)


def command(folder: Path, *arguments: object, status: int = 0) -> str:
    """What a command prints on stdout and stderr, run in a folder as a person runs it."""
    bin_folder = Path(sys.executable).parent
    program = bin_folder / str(arguments[0])
    assert program.exists(), f"{program} is missing: pip install -e ."
    done = subprocess.run(
        [program, *map(str, arguments[1:])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


def fill(folder: Path, label: int, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(write_image(sample_image(label, number, size=80)))


@dataclass(frozen=True)
class Made:
    """A folder with `photos`, what the commands made of them in it, and what the training said."""

    folder: Path
    said: str

    @property
    def model(self) -> Path:
        return self.folder / "photos-model"


def made_in(folder: Path) -> Made:
    said = command(folder, "dsd-train", "init", "photos")
    said += command(folder, "dsd-train", "photos.toml", *TINY, *FEW)
    command(folder, "dsd-export", "runs/photos/checkpoint.pt", "-o", "photos-model")
    return Made(folder, said)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of three folders."""
    folder = tmp_path_factory.mktemp("three")
    for label, name in enumerate(NAMES):
        fill(folder / "photos" / name, label, 8)
    return made_in(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of a folder without folders."""
    folder = tmp_path_factory.mktemp("one")
    fill(folder / "photos", 1, 16)
    return made_in(folder)


def page_of(made: Made) -> Iterator[httpx.Client]:
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")
    server = Server("--ui", "--model", str(made.model))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    assert server.stop() == 0
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def served(three: Made) -> Iterator[httpx.Client]:
    yield from page_of(three)


@pytest.fixture(scope="module")
def plain(one: Made) -> Iterator[httpx.Client]:
    yield from page_of(one)


def drawn(client: httpx.Client, name: str | None) -> bytes:
    """The PNG that curl gets."""
    program = shutil.which("curl") or pytest.skip("curl is not installed")
    query = [part for key, value in QUICK.items() for part in ("--data", f"{key}={value}")]
    query += ["--data-urlencode", f"class={name}"] if name else []
    asked = [program, "-sS", "--fail", "--get", *query, f"{client.base_url}/generate"]
    return subprocess.run(asked, check=True, capture_output=True).stdout


def refusal(answer: httpx.Response) -> str:
    assert answer.status_code in (400, 422), answer.text
    body = answer.json()
    return str(body["error"]["message"] if "error" in body else body["detail"])


def check_own(answers: Iterable[httpx.Response]) -> None:
    """Nothing of ImageNet is in the answers or in their headers."""
    for answer in answers:
        found = IMAGENET.search(f"{answer.headers}{answer.text}")
        assert not found, f"{answer.url}: {found}"


def settings_in(png: bytes, folder: Path) -> dict[str, object]:
    (folder / "drawn.png").write_bytes(png)
    with Image.open(folder / "drawn.png") as image:
        assert image.size == (SIZE, SIZE)
        return dict(json.loads(image.text["dsd"]))


@pytest.fixture
def gradio(tmp_path: Path) -> Callable[[httpx.Client], object]:
    def connect(client: httpx.Client) -> object:
        from gradio_client import Client

        return Client(str(client.base_url), verbose=False, download_files=str(tmp_path))

    return connect


# Three folders


def test_the_size_and_the_names_come_from_the_folders(three):
    assert "3 classes (Café, Grandma's cat, 金毛犬), 8 images each" in three.said
    assert "next: dsd-train photos.toml" in three.said
    network = json.loads((three.model / "config.json").read_text(encoding="utf-8"))["network"]
    assert (network["image_size"], network["patch_size"], network["num_classes"]) == (SIZE, 16, 3)
    assert tuple(network["class_names"]) == NAMES
    assert not IMAGENET.search(three.said + (three.model / "card.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("index", range(3))
def test_curl_python_and_shell_draw_a_class_by_its_name(served, three, index, tmp_path):
    name = NAMES[index]
    png = drawn(served, name)
    assert settings_in(png, tmp_path)["class"] == {"index": index, "name": name}
    command(tmp_path, "dsd-generate", name, "--model", three.model, "--steps", 2, "--seed", 1, "-o", "shell.png")
    assert (tmp_path / "shell.png").read_bytes() == png
    with dsd_serve.load(three.model) as model:
        image = model.generate(name, seed=1, num_steps=2)
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), read_image(png))


def test_the_openai_client_draws_by_name(served):
    openai = pytest.importorskip("openai", reason="the test needs openai: pip install '.[dev]'")
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0)
    for name in NAMES:
        answer = client.images.generate(prompt=name, extra_body={"seed": 1, "num_inference_steps": 2})
        assert base64.b64decode(answer.data[0].b64_json) == drawn(served, name)
    with pytest.raises(
        openai.BadRequestError, match="the model has 0 \\(Café\\), 1 \\(Grandma's cat\\), 2 \\(金毛犬\\)"
    ):
        client.images.generate(prompt="a dog")


def test_the_page_draws_by_name(served, gradio):
    page = gradio(served)
    assert [c["name"] for c in page.predict("", api_name="/classes")] == list(NAMES)
    files, settings = page.predict("金毛犬", 1, 1, 2, "heun", 1, api_name="/generate")
    assert (len(files), settings["class"]) == (1, {"index": 2, "name": "金毛犬"})
    strip, _ = page.predict("Café", 1, "Grandma's cat", 1, 2, api_name="/walk")
    assert len(strip) == 2


def test_evaluation_finds_the_classes_by_name(three):
    arguments = ["--samples", 6, "--steps", 1, "--device", "cpu", "--no-cache", "--output", "metrics.json"]
    printed = command(three.folder, "dsd-eval", "photos-model", "--real", "photos", *arguments)
    assert "64 x 64 pixels, 3 classes" in printed
    found = json.loads((three.folder / "metrics.json").read_text(encoding="utf-8"))
    assert (found["classes"], found["class_names"]) == ([0, 1, 2], list(NAMES))
    assert not any("top1" in key for key in found["models"][0]["samples"])


def test_nothing_of_imagenet_is_in_any_answer(served):
    assert [c["name"] for c in served.get("/classes").json()] == list(NAMES)
    answers = [served.get(path, follow_redirects=True) for path in PAGES]
    answers += [served.get("/generate", params={"class": name, **QUICK, "format": "json"}) for name in NAMES]
    assert {answer.status_code for answer in answers} == {200}
    for wrong in ("dog", "4", "", "?"):
        answers.append(served.get("/generate", params={"class": wrong}))
        assert "the model has 0 (Café), 1 (Grandma's cat), 2 (金毛犬)" in refusal(answers[-1])
    check_own(answers)


@pytest.fixture
def triton_of(tmp_path):
    """Starts a real Triton server with a model: triton_of(three) -> it."""
    from tools.tritonserver import TritonMissing, TritonServer, binary

    try:
        binary()
        import tritonclient.grpc  # noqa: F401
    except (TritonMissing, ImportError) as error:
        pytest.skip(f"NOT TESTED on Triton: {error}")
    with contextlib.ExitStack() as stack:

        def start(trained):
            command(tmp_path, "dsd-export", trained.model, "--triton", "repository", "--triton-device", "cpu")
            return stack.enter_context(TritonServer(tmp_path / "repository", tmp_path / "log"))

        yield start


@pytest.mark.triton
def test_triton_draws_by_name(served, three, triton_of):
    triton = triton_of(three)
    asked = {"operation": "generate", "seed": 1, "num_steps": 2}
    for name in NAMES:
        answer = httpx.post(f"{triton.http}/v2/models/dsd/generate", json={**asked, "label": name}, timeout=60)
        assert answer.status_code == 200, answer.text
        pixels = np.array(answer.json()["image"], np.uint8).reshape(3, SIZE, SIZE)
        assert np.array_equal(pixels, read_image(drawn(served, name)))
    refused = httpx.post(f"{triton.http}/v2/models/dsd/generate", json={**asked, "label": "dog"}, timeout=60)
    assert "the model has 0 (Café), 1 (Grandma's cat), 2 (金毛犬)" in refused.json()["error"]
    front = Server("--triton", triton.grpc)
    with httpx.Client(base_url=front.url, timeout=60) as client:
        assert client.get("/classes").json() == served.get("/classes").json()
        assert drawn(client, "金毛犬") == drawn(served, "金毛犬")
        assert client.get("/model/card").text == served.get("/model/card").text
    assert front.stop() == 0


# A folder without folders


def test_a_folder_without_folders_makes_a_model_without_classes(plain, one, gradio, tmp_path):
    assert "no classes: the model draws without one" in one.said
    png = drawn(plain, None)
    assert settings_in(png, tmp_path)["class"] is None
    command(tmp_path, "dsd-generate", "--model", one.model, "--steps", 2, "--seed", 1, "-o", "shell.png")
    assert (tmp_path / "shell.png").read_bytes() == png
    with dsd_serve.load(one.model) as model:
        assert np.array_equal(np.asarray(model.generate(seed=1, num_steps=2)).transpose(2, 0, 1), read_image(png))
    answer = plain.post("/v1/images/generations", json={"prompt": "image", "seed": 1, "num_inference_steps": 2})
    assert base64.b64decode(answer.json()["data"][0]["b64_json"]) == png
    page = gradio(plain)
    files, settings = page.predict("", 1, 1, 2, "heun", 1, api_name="/generate")
    assert (len(files), settings["class"]) == (1, None)
    assert page.predict("", api_name="/classes") == plain.get("/classes").json() == []


@pytest.mark.triton
def test_triton_draws_without_classes(plain, one, triton_of):
    triton = triton_of(one)
    asked = {"operation": "generate", "seed": 1, "num_steps": 2}
    answer = httpx.post(f"{triton.http}/v2/models/dsd/generate", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    size = plain.get("/model").json()["image_size"]
    assert np.array_equal(
        np.array(answer.json()["image"], np.uint8).reshape(3, size, size), read_image(drawn(plain, None))
    )
    refused = httpx.post(f"{triton.http}/v2/models/dsd/generate", json={**asked, "label": "cat"}, timeout=60)
    assert "this model has no classes" in refused.json()["error"]
    front = Server("--triton", triton.grpc)
    with httpx.Client(base_url=front.url, timeout=60) as client:
        assert client.get("/classes").json() == []
        assert drawn(client, None) == drawn(plain, None)
        assert refusal(client.get("/generate", params={"class": "cat"})).startswith("class must be left out")
    assert front.stop() == 0


def test_a_model_without_classes_is_evaluated(one):
    arguments = ["--samples", 6, "--steps", 1, "--device", "cpu", "--no-cache"]
    assert "no classes" in command(one.folder, "dsd-eval", "photos-model", "--real", "photos", *arguments)


def test_a_model_without_classes_refuses_one_in_a_sentence(plain, one, tmp_path):
    sentence = "class must be left out: this model has no classes, got '金毛犬'"
    asked = {"class": "金毛犬"}
    assert refusal(plain.get("/generate", params=asked)) == refusal(plain.post("/generate", json=asked)) == sentence
    arguments = ["dsd-generate", "金毛犬", "--model", one.model, "-o", "a.png"]
    assert sentence in command(tmp_path, *arguments, status=1)
    with dsd_serve.load(one.model) as model, pytest.raises(InputError, match="this model has no classes, got '金毛犬'"):
        model.generate("金毛犬")
    assert "this model has no classes" in refusal(plain.post("/v1/images/generations", json={"prompt": "金毛犬"}))
    check_own(plain.get(path, follow_redirects=True) for path in PAGES)


# Broken files


@pytest.mark.parametrize("memory", [1, 0])
def test_a_run_over_300_images_with_three_broken_ones_ends_well_and_lists_them(tmp_path, memory):
    for label, name in enumerate(NAMES):
        fill(tmp_path / "photos" / name, label, 100)
    broken = [f"photos/{NAMES[0]}/10.png", f"photos/{NAMES[1]}/20.png", f"photos/{NAMES[2]}/30.png"]
    for name, content in zip(broken, (b"", b"<html>404</html>", None), strict=True):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:300] if content is None else content)
    command(tmp_path, "dsd-train", "init", "photos")
    few = ["optim.steps=6", "optim.batch_size=64", "optim.micro_batch_size=64", f"data.memory_gb={memory}"]
    said = command(tmp_path, "dsd-train", "photos.toml", *TINY, *FEW, *few)  # each image once and some twice
    assert "3 images skipped, because they cannot be read; runs/photos/broken.tsv lists them" in said
    assert "done after step 6" in said
    listed = (tmp_path / "runs/photos/broken.tsv").read_text(encoding="utf-8").splitlines()
    assert {line.split("\t")[0].rpartition("photos/")[2] for line in listed} == {
        name.partition("/")[2] for name in broken
    }
    assert all(line.split("\t")[1] for line in listed)
