"""The Python API against a real server of the same model: the same bytes; errors for wrong arguments."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import dsd_serve
from dsd_serve.errors import CheckpointError, ClosedError, EngineUnavailableError, InputError
from dsd_serve.imaging.codec import write_image
from dsd_serve.imaging.latents import read_npy_of_any_shape
from tests.support.data import ROOT, sample_image


@pytest.fixture(scope="module")
def model(tiny_dir):
    with dsd_serve.load(tiny_dir, row_budget=16) as model:
        yield model


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    file.write_bytes(write_image(sample_image(1, 0, size=40)))
    return file


@pytest.fixture(scope="module")
def mask():
    pixels = np.zeros((3, 40, 40), np.uint8)
    pixels[:, 20:] = 255
    return write_image(pixels)


def same(image: Image.Image, png: bytes) -> None:
    assert dsd_serve.to_png(image) == png


def test_images_are_byte_identical_to_the_servers(model, http):
    query = {"class": 207, "seed": 7}
    same(model.generate("207", seed=7), http.get("/generate", params=query).content)
    settings = {"sampler": "heun", "guidance_start": 0.1, "guidance_stop": 0.8}
    image = model.generate(207, seed=7, size=64, num_steps=3, guidance_scale=2.5, index=4, **settings)
    answer = http.get("/generate", params={**query, **settings, "steps": 3, "guidance": 2.5, "index": 4, "size": 64})
    same(image, answer.content)
    assert json.loads(image.info["dsd"])["guidance"] == 2.5


def test_several_images_have_the_indices_of_one_request(model, http):
    found = model.generate(["n02099601", 950], n=2, seed=3, num_steps=2)
    alone = [
        http.get("/generate", params={"class": label, "seed": 3, "index": i, "steps": 2}).content
        for label in (207, 950)
        for i in (0, 1)
    ]
    assert [dsd_serve.to_png(image) for image in found] == alone


def test_edits_are_byte_identical_to_the_servers(model, http, photo, mask):
    query = {"class": 950, "strength": 0.5, "seed": 2}
    body = photo.read_bytes()
    same(model.edit(photo, 950, strength=0.5, seed=2), http.post("/edit", params=query, content=body).content)
    files = {"image": body, "mask": mask}
    masked = http.post("/edit", params=query, files=files).content
    for image in (str(photo), body, Image.open(photo), np.asarray(Image.open(photo))):
        same(model.edit(image, 950, strength=0.5, mask=mask, seed=2), masked)
    free = http.post("/edit", params={"seed": 2}, content=body).content
    same(model.edit(photo, seed=2), free)
    two = model.edit(photo, 950, strength=0.5, seed=2, n=2)
    assert dsd_serve.to_png(two[0]) == http.post("/edit", params=query, content=body).content


def test_latents_are_bit_identical_to_the_servers(model, http, photo):
    z = model.encode(photo)
    npy = http.post("/encode", content=photo.read_bytes()).content
    assert np.array_equal(z, read_npy_of_any_shape(npy))
    decoded = http.post("/decode", content=npy, headers={"content-type": "application/x-npy"})
    for found in (model.decode(z), model.decode(z[None])[0], model.decode([z])[0]):
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(decoded.content))))
    made = model.reconstruct(photo)
    answer = http.post("/reconstruct", content=photo.read_bytes())
    assert np.array_equal(np.asarray(made), np.asarray(Image.open(io.BytesIO(answer.content))))
    assert float(answer.headers["x-dsd-psnr"]) == made.info["psnr"]
    assert [one.shape for one in model.encode([photo, photo])] == [z.shape] * 2


def test_walks_are_identical_to_the_servers(model, http, photo):
    """Pixels are compared, because a PNG of a walk has the settings of the whole strip."""
    body = {"from": {"class": 207, "seed": 1}, "to": {"class": 950, "seed": 2}, "n": 3, "steps": 2}
    strip = np.asarray(Image.open(io.BytesIO(http.post("/interpolate", json=body).content)))
    walk = model.walk(207, "950", n=3, seed=1, end_seed=2, num_steps=2)
    assert np.array_equal(np.concatenate([np.asarray(one) for one in walk], axis=1), strip)
    assert [json.loads(one.info["dsd"])["fraction"] for one in walk] == [0, 0.5, 1]
    other = write_image(sample_image(207, 1, size=30))
    files = {"from": photo.read_bytes(), "to": other}
    strip = np.asarray(Image.open(io.BytesIO(http.post("/interpolate", params={"n": 4}, files=files).content)))
    walk = model.walk(photo, other, n=4)
    assert np.array_equal(np.concatenate([np.asarray(one) for one in walk], axis=1), strip)


def test_without_a_seed_images_differ_and_record_their_seeds(model):
    first, second = (model.generate(1, num_steps=1) for _ in range(2))
    seeds = [json.loads(image.info["dsd"])["seed"] for image in (first, second)]
    assert seeds[0] != seeds[1]
    assert dsd_serve.to_png(model.generate(1, num_steps=1, seed=seeds[0])) == dsd_serve.to_png(first)


def test_previews_come_in_order_with_the_size_of_the_image(model):
    seen = []
    model.generate(
        [1, 207],
        n=2,
        seed=1,
        num_steps=4,
        size=32,
        on_preview=lambda i, step, image: seen.append((i, step, image.size)),
    )
    assert sorted(seen) == [(i, step, (32, 32)) for i in range(4) for step in (1, 2, 3)]
    few = []
    model.edit(
        sample_image(1, 0).transpose(1, 2, 0),
        1,
        num_steps=4,
        strength=1,
        preview_every=2,
        on_preview=lambda *p: few.append(p[:2]),
    )
    assert few == [(0, 2)]


def test_threads_share_the_model_and_get_their_own_images(model):
    alone = [dsd_serve.to_png(model.generate(207, seed=seed)) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda seed: dsd_serve.to_png(model.generate(207, seed=seed)), range(12)))
    assert together == alone


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate("unicorn"), "class must be an index, a wnid like n02099601 or a name, got 'unicorn'"),
        (lambda m: m.generate(1.0), "class must be an index, a wnid like n02099601 or a name, got 1.0"),
        (lambda m: m.decode(None), "latents must be numbers of shape"),
        (lambda m: m.generate(5), "which this model was not trained on"),
        (lambda m: m.generate(1, steps=3), "there is no setting 'steps'; the settings are index, num_steps, sampler"),
        (lambda m: m.generate(1, num_steps=0), "num_steps must be a whole number from 1 to 1000, got 0"),
        (lambda m: m.generate(1, sampler="ddim"), "sampler must be one of euler, heun, dpmpp_2m, flow_map, got 'ddim'"),
        (lambda m: m.generate(1, seed=-1), "seed must be a whole number from 0"),
        (lambda m: m.generate(1, n=0), "n must be a whole number from 1 to"),
        (lambda m: m.generate(1, size=4), "size must be a whole number from 8"),
        (lambda m: m.edit("nowhere.jpg", 1), "the image 'nowhere.jpg' cannot be read: No such file"),
        (lambda m: m.edit(b"no image", 1), "PNG, JPEG or WebP"),
        (lambda m: m.edit(3.5, 1), "an image must be a path, bytes, a PIL image or uint8"),
        (
            lambda m: m.edit(np.zeros((3, 4, 4)), 1),
            "an image as an array must be uint8 [H, W, 3], got float64 [3, 4, 4]",
        ),
        (
            lambda m: m.edit(np.zeros((4, 4, 3), np.uint8), 1, strength=0),
            "strength must be above 0 and at most 1, got 0",
        ),
        (lambda m: m.edit(np.zeros((4, 4, 3), np.uint8), guidance_scale=3), "guidance_scale needs a class"),
        (lambda m: m.decode(np.zeros((2, 2))), "latents must be numbers of shape"),
        (lambda m: m.decode(np.full(m.info.config.latent_shape, np.nan)), "latents must be finite numbers"),
        (lambda m: m.walk(1, 207, n=1), "n must be a whole number from 2"),
        (lambda m: m.walk(1, b"image"), "start and end must be two classes or two images"),
        (lambda m: m.walk(1, "unicorn"), "end must be an index, a wnid"),
        (lambda m: m.walk(b"a", b"b", seed=1), "needs no noise, so leave out seed"),
    ],
)
def test_wrong_arguments_get_a_sentence(model, call, words):
    with pytest.raises(InputError) as caught:
        call(model)
    assert words in str(caught.value)


def test_numbers_of_numpy_are_numbers(model):
    """As labels from a dataset, and seeds from a generator, are."""
    expected = [image.tobytes() for image in model.generate([1, 207], seed=3, num_steps=2)]
    drawn = model.generate(np.array([1, 207]), seed=np.uint64(3), num_steps=np.int32(2))
    assert [image.tobytes() for image in drawn] == expected
    one = model.generate(np.int64(207), seed=3, num_steps=2, guidance_scale=np.float32(1))
    assert one.info["dsd"] == model.generate(207, seed=3, num_steps=2, guidance_scale=1.0).info["dsd"]


def test_latents_and_masks_come_as_arrays_too(model):
    z = model.encode(np.full((32, 32, 3), 99, np.uint8))
    assert model.decode(z.tolist()).tobytes() == model.decode(z).tobytes() == model.decode([z])[0].tobytes()
    assert model.decode(np.stack([z, z]))[1].tobytes() == model.decode(z).tobytes()
    side = model.info.config.image_size
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    mask = np.zeros((side, side), bool)
    mask[: side // 2] = True
    drawn = np.asarray(model.edit(photo, 207, strength=1, mask=mask, seed=1))
    assert (drawn[~mask] == photo[~mask]).all() and (drawn[mask] != photo[mask]).any()


def test_a_closed_model_raises(tiny_dir):
    with dsd_serve.load(tiny_dir, row_budget=4) as model:
        assert "tiny" in repr(model)
    with pytest.raises(ClosedError, match="the model is closed"):
        model.generate(1)
    model.close()


def test_a_failed_load_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        dsd_serve.load(tmp_path / "nowhere")
    with pytest.raises(EngineUnavailableError, match="engine must be one of"):
        dsd_serve.load(engine="abacus")


def test_the_package_loads_nothing_until_it_is_used_and_never_torch():
    code = """
import sys
sys.modules["torch"] = None
import dsd_serve
assert not {"numpy", "onnxruntime", "httpx", "PIL"} & set(sys.modules), "loaded too early"
model = dsd_serve.load(row_budget=4)
image = model.generate("golden retriever", seed=7, num_steps=1)
assert "dsd_serve.shell" not in sys.modules
assert image.size == (32, 32) and [c.name for c in model.classes][3] == "Golden Retriever", model.classes
assert set(dsd_serve.__all__) <= set(dir(dsd_serve)) and all(getattr(dsd_serve, name) for name in dsd_serve.__all__)
model.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_settings_of_an_image_are_those_of_a_server(model, http):
    answer = http.get("/generate", params={"class": 1, "seed": 1, "format": "json"}).json()
    image = model.generate(1, seed=1)
    ours = json.loads(image.info["dsd"])
    assert {name: answer[name] for name in ours} == ours
    assert model.info.settings_of(None, model.info.defaults)["class"] is None
