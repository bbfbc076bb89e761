"""The network of a web page in Chromium and in Firefox: what it draws is what the engine draws. `make test-ui`."""

import functools
import json
import shutil
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.engines.onnx_engine import OnnxEngine
from dsd_serve.imaging import codec
from dsd_serve.programs import Edit, Generate, Interpolate, Reconstruct, WalkEnd, encode, run
from export.web_folder import write_web
from tests.support.browser import FLAGS
from tests.support.data import sample_image
from tests.support.firefox import firefox
from tests.support.web_runtime import installed_runtime

pytestmark = pytest.mark.browser

MOST_BYTES = 25_000_000
BLANK = "<!doctype html><title>A page of nothing</title>"
OPEN = "const { DSD } = await import(url + 'client.js'); const network = await DSD.load('./');"


POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'"
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


class Site:
    """A folder on a static host, below a path, with a strict content security policy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, []  # paths that were not answered with 304, "not modified"

        class Handler(SimpleHTTPRequestHandler):
            def log_request(handler, code: int = 0, *_: object) -> None:
                self.sent.extend([handler.path] if code != 304 else [])

            def log_message(handler, *_: object) -> None:
                pass

            def end_headers(handler) -> None:
                handler.send_header("Content-Security-Policy", POLICY)
                SimpleHTTPRequestHandler.end_headers(handler)

        make = functools.partial(Handler, directory=folder.parent)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), make)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/{quote(folder.name)}/"


@pytest.fixture(scope="module")
def site(demo_dir, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("static") / "a page"
    write_web(demo_dir, folder, installed_runtime())
    (folder / "blank.html").write_text(BLANK)
    site = Site(folder)
    yield site
    site.server.shutdown()


@pytest.fixture(scope="module")
def ours(demo_dir):
    """Runs tasks by the engine: ours(task) -> pixels [H, W, 3]."""
    engine = OnnxEngine.load(demo_dir)
    return lambda task: run(engine, task.program(engine.config)).transpose(1, 2, 0).astype(int)


@pytest.fixture(scope="module")
def params(demo_dir):
    return read_model_dir(demo_dir).defaults


@pytest.fixture(scope="module")
def classes(demo_dir):
    return read_model_dir(demo_dir).config.trained_classes


@pytest.fixture(scope="module")
def tab(browser, site):
    """A tab with `network`, and no way to anything but the site."""
    context = browser.new_context()
    strangers = []
    context.route(lambda url: not url.startswith(site.url), lambda route: strangers.append(route) or route.abort())
    tab = context.new_page()
    tab.goto(site.url + "blank.html")
    tab.evaluate(f"async (url) => {{ {OPEN} window.network = network; }}", site.url)
    yield tab
    context.close()
    assert not strangers


def shown(pixels) -> np.ndarray:
    """RGBA as a browser sends it -> pixels [H, W, 3]; all opaque."""
    rgba = np.array(pixels).reshape(32, 32, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def to_rgba(pixels: np.ndarray) -> list[int]:
    return np.concatenate([pixels.transpose(1, 2, 0), np.full((32, 32, 1), 9, np.uint8)], -1).ravel().tolist()


PHOTO = """
async ([url, base64]) => {
  const { readPhoto } = await import(url + "page/photo_file.js");
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  return [...(await readPhoto(new File([bytes], "a.png"), 32)).pixels];
}
"""


@pytest.mark.parametrize("width, height", [(600, 400), (300, 1000), (4000, 3000), (64, 64), (21, 21), (32, 32), (1, 1)])
def test_photos_are_scaled_as_by_the_server(tab, site, width, height):
    rng = np.random.default_rng(0)
    smooth = codec.resize(rng.integers(0, 256, (3, 12, 12), np.uint8), max(width, height))[:, :height, :width]
    photo = codec.write_image(np.clip(smooth + rng.integers(-30, 30, smooth.shape), 0, 255).astype(np.uint8))
    received = shown(tab.evaluate(PHOTO, [site.url, b64encode(photo).decode()]))
    difference = np.abs(received.astype(int) - codec.read_image(photo, size=32).transpose(1, 2, 0))
    assert difference.max() <= 6 and difference.mean() <= 2


SEEDS = """
async (labels) => {
  const images = [];
  for (let seed = 0; seed < labels.length; seed++) {
    images.push([...(await network.generate({ label: labels[seed], seed })).pixels]);
  }
  return images;
}
"""


def check_seeds(images, labels, ours, params):
    assert len(images) == len(labels)
    differences = [
        np.abs(shown(image) - ours(Generate(label, replace(params, seed=seed)))).max()
        for seed, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    assert max(differences) <= 1, differences
    assert len({json.dumps(image) for image in images}) == len(images)


def test_forty_seeds_are_those_of_the_engine(tab, ours, params, classes):
    labels = [classes[seed % len(classes)] for seed in range(40)]
    check_seeds(tab.evaluate(SEEDS, labels), labels, ours, params)


def test_firefox_draws_the_same(site, ours, params, classes, tmp_path):
    labels = list(classes[:4])
    with firefox(tmp_path / "profile") as tab:
        tab.goto(site.url + "blank.html")
        tab.evaluate(f"async (url) => {{ {OPEN} window.network = network; return network.info.provider; }}", site.url)
        check_seeds(tab.evaluate(SEEDS, labels), labels, ours, params)


def test_all_settings_and_the_largest_seed(tab, ours, params, classes):
    settings = {"sampler": "heun", "steps": 3, "guidance": 2.5, "guidance_start": 0.2, "guidance_stop": 0.7}
    image = tab.evaluate(
        "async (options) => [...(await network.generate({ ...options, seed: 2n ** 63n - 1n })).pixels]",
        {**settings, "label": classes[1], "index": 3},
    )
    expected = replace(
        params, sampler="heun", num_steps=3, guidance_scale=2.5, guidance_start=0.2, guidance_stop=0.7, index=3
    )
    drawn = ours(Generate(classes[1], replace(expected, seed=2**63 - 1)))
    assert np.abs(shown(image) - drawn).max() <= 1


def test_edits(tab, ours, params, classes):
    photo, mask = sample_image(207, 0, size=32), np.zeros((32, 32), bool)
    mask[5:20, 8:30] = True
    for drawn_mask in (None, mask):
        options = {"label": classes[0], "strength": 0.7, "seed": 5}
        image = tab.evaluate(
            """async ([options, pixels, mask]) => [...(await network.edit({ ...options,
                 pixels: Uint8ClampedArray.from(pixels), mask: mask && Uint8Array.from(mask) })).pixels]""",
            [options, to_rgba(photo), None if drawn_mask is None else drawn_mask.astype(int).ravel().tolist()],
        )
        expected = ours(Edit(photo, classes[0], replace(params, seed=5), 0.7, drawn_mask))
        assert np.abs(shown(image) - expected).max() <= 1
    assert (shown(image)[~mask] == photo.transpose(1, 2, 0)[~mask]).all()


def test_a_walk(tab, ours, params, classes):
    ends = WalkEnd(classes[0], 1), WalkEnd(classes[1], 2)
    images, numbers = tab.evaluate(
        """async ([start, end]) => {
             const numbers = [];
             const images = await network.walk({ start, end, n: 3, onImage: ({ number }) => numbers.push(number) });
             return [images.map(({ pixels }) => [...pixels]), numbers];
           }""",
        [{"label": end.label, "seed": end.seed} for end in ends],
    )
    assert numbers == [0, 1, 2]
    for image, fraction in zip(images, (0, 0.5, 1), strict=True):
        assert np.abs(shown(image) - ours(Interpolate(*ends, fraction, params))).max() <= 1


def test_what_the_network_keeps_of_a_photo(tab, ours, demo_dir):
    photo = sample_image(1, 0, size=32)
    kept, latents, again, decoded = tab.evaluate(
        """async (pixels) => {
             const options = { pixels: Uint8ClampedArray.from(pixels) };
             const { pixels: kept, latents } = await network.reconstruct(options);
             const encoded = await network.encode(options);
             const decoded = await network.decode(encoded);
             return [kept, latents, encoded.latents, decoded.pixels].map((values) => [...values]);
           }""",
        to_rgba(photo),
    )
    assert np.abs(shown(kept) - ours(Reconstruct(photo))).max() <= 1
    assert latents == again and decoded == kept
    theirs = run(OnnxEngine.load(demo_dir), encode(photo))
    assert np.abs(np.array(latents) - theirs.ravel()).max() < 1e-4


def test_an_image_forms_while_the_page_stays_responsive(tab, classes):
    steps, gap = tab.evaluate(
        """async (label) => {
             let [last, gap, steps] = [performance.now(), 0, []];
             const timer = setInterval(() => {
               gap = Math.max(gap, performance.now() - last);
               last = performance.now();
             }, 10);
             await network.generate({ label, steps: 60, onStep: ({ step, steps: count, pixels }) => {
               steps.push([step, count, pixels.length]);
             } });
             clearInterval(timer);
             return [steps, gap];
           }""",
        classes[0],
    )
    assert steps == [[step, 60, 4096] for step in range(1, 60)]
    assert gap < 500, "a drawing takes seconds, but not of the page"


def test_calls_are_cancelled_and_later_ones_carried_out(tab, classes):
    names, milliseconds, width = tab.evaluate(
        """async (label) => {
             const calls = [0, 1, 2].map((seed) => network.generate({ label, seed, steps: 1000 }));
             const errors = calls.map((call) => call.catch((error) => error.name));
             await new Promise((resolve) => setTimeout(resolve, 100));
             const began = performance.now();
             network.cancel();
             const names = await Promise.all(errors);
             const milliseconds = performance.now() - began;
             return [names, milliseconds, (await network.generate({ label, steps: 1 })).width];
           }""",
        classes[0],
    )
    assert (names, width) == (["CancelledError"] * 3, 32)
    assert milliseconds < 500


@pytest.mark.parametrize(
    "call, says",
    [
        ("network.generate({ label: 0 })", "label must be the index of one of the"),
        ("network.generate({ label: '207' })", 'got "207"'),
        ("network.edit({ pixels: new Uint8ClampedArray(4), label: null, strength: 1 })", "of 4096 numbers, got Uint8"),
        ("network.edit({ pixels: new Uint8ClampedArray(4096), label: null, strength: 0 })", "strength must be above 0"),
        ("network.walk({ start: {}, end: {}, n: 1 })", "n must be a whole number from 2 to 100, got 1"),
        ("network.decode({ latents: new Float32Array(512).fill(NaN) })", "latents must be finite numbers"),
        ("network.decode({ latents: () => 1 })", "cannot be sent to the worker"),
    ],
)
def test_a_wrong_argument_is_a_sentence(tab, call, says):
    name, message = tab.evaluate(f"() => {call}.catch((error) => [error.name, error.message])")
    assert name == "InputError" and says in message


def test_what_a_visitor_fetches(browser, site):
    """With an empty cache: the bytes of everything, and no byte twice."""
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(site.url + "blank.html")
    site.sent.clear()
    info, progress = tab.evaluate(
        """async (url) => {
             const { DSD } = await import(url + "client.js");
             const progress = [];
             const network = await DSD.load("./", (one) => progress.push(one));
             await network.generate({ label: null, steps: 1 });
             network.close();
             return [network.info, progress];
           }""",
        site.url,
    )
    context.close()
    assert info["provider"] == "wasm"
    assert info["fetchedBytes"] < MOST_BYTES
    fetched = [one["fetched"] for one in progress]
    assert fetched == sorted(fetched) and fetched[-1] == progress[-1]["total"] == info["fetchedBytes"]
    assert progress[-1]["stage"] == "starting"
    names = [path.partition("?")[0].rpartition("/")[2] for path in site.sent if "favicon" not in path]
    assert len(names) == len(set(names))
    sizes = {file.name: file.stat().st_size for file in site.folder.rglob("*") if file.is_file()}
    assert sum(sizes[name] for name in names) < MOST_BYTES
    assert not [name for name in names if "jspi" in name], "without a GPU nothing of WebGPU is fetched"


def test_webgpu_on_a_software_adapter(browser, own_dir, tmp_path):
    """Where it is asked for: by itself the page does not take an adapter that is not a GPU."""
    write_web(own_dir, tmp_path / "site", installed_runtime())
    (tmp_path / "site/blank.html").write_text(BLANK)
    site, model, engine = Site(tmp_path / "site"), read_model_dir(own_dir), OnnxEngine.load(own_dir)
    flags = [flag for flag in FLAGS if flag != "--disable-gpu"]
    with_gpu = browser.browser_type.launch(executable_path=shutil.which("chromium"), args=[*flags, *SOFTWARE_GPU])
    tab = with_gpu.new_page()
    tab.goto(site.url + "blank.html")
    if not tab.evaluate("async () => Boolean(await navigator.gpu?.requestAdapter())"):
        pytest.skip("this Chromium has no software adapter of WebGPU")
    for provider, runs in (("auto", "wasm"), ("webgpu", "webgpu")):
        site.sent.clear()
        used, images = tab.evaluate(
            """async ([url, provider]) => {
                 const { DSD } = await import(url + "client.js");
                 const network = await DSD.load("./", null, { provider });
                 const images = [];
                 for (const { index } of network.info.classes) {
                   images.push([...(await network.generate({ label: index, seed: 3 })).pixels]);
                 }
                 network.close();
                 return [network.info.provider, images];
               }""",
            [site.url, provider],
        )
        assert used == runs
        assert any("jspi.wasm" in path for path in site.sent) == (runs == "webgpu")
        for label, image in zip(model.config.trained_classes, images, strict=True):
            drawn = run(engine, Generate(label, replace(model.defaults, seed=3)).program(model.config))
            ours = drawn.transpose(1, 2, 0).astype(int)
            assert np.abs(np.array(image).reshape(*ours.shape[:2], 4)[..., :3] - ours).max() <= 1
    with_gpu.close()
    site.server.shutdown()
