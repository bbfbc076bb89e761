"""The maths of the web page in Node: its random numbers and programs are those of NumPy and of dsd_serve."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dsd_serve.config import ModelConfig
from dsd_serve.params import SamplingParams, samplers_of, to_api
from dsd_serve.programs import Edit, Generate, Interpolate, Reconstruct, WalkEnd, between
from dsd_serve.rows import Decode, Encode
from dsd_serve.samplers import initial_noise
from export.web_folder import settings_of, shape_of
from tests.support.data import ROOT
from tests.support.models import TINY

WEB = ROOT / "export/web"
TAIL = 3.6541527  # beyond, numbers go through log1p, which C libraries round differently
CORNERS = [0, 1, 2**31, 2**32 - 1, 2**53 - 1, 2**53 + 1, 2**63 - 1]


def node(*arguments, text=""):
    program = shutil.which("node")
    if program is None:
        pytest.skip("the tests of the page's maths need Node: apt-get install nodejs")
    done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def numbers(keys, count):
    """`count` numbers of each (seed, index) from philox.js: float32 [keys, count]."""
    code = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ standardNormal }} from {json.dumps(str(WEB / "philox.js"))};
        const keys = JSON.parse(readFileSync(0, "utf-8"));
        console.log(JSON.stringify(keys.map(([seed, index]) => [...standardNormal(seed, index, {count})])));
    """
    text = json.dumps([[str(seed), str(index)] for seed, index in keys])
    return np.array(node("--input-type=module", "-e", code, text=text), np.float32)


def test_the_random_numbers_are_numpys():
    rng = np.random.default_rng(0)
    keys = [(seed, index) for seed in CORNERS for index in (0, 1, 2**63 - 1)]
    keys += [(int(seed), int(index)) for seed, index in rng.integers(0, 2**63, (80, 2), np.uint64)]
    ours, theirs = numbers(keys, 4096), np.stack([initial_noise(seed, index, (4096,)) for seed, index in keys])
    tails = np.abs(theirs) > TAIL
    assert tails.sum() > 50
    np.testing.assert_array_equal(ours[~tails], theirs[~tails])
    np.testing.assert_array_max_ulp(ours[tails], theirs[tails], 1)


def test_seeds_may_be_numbers_texts_and_big_integers():
    code = f"""
        import {{ standardNormal }} from {json.dumps(str(WEB / "philox.js"))};
        console.log(JSON.stringify([7, "7", 7n].map((seed) => [...standardNormal(seed, 0, 9)])));
    """
    first, *others = node("--input-type=module", "-e", code)
    assert others == [first, first]
    assert first == initial_noise(7, 0, (9,)).tolist()


@pytest.mark.parametrize("width, side", [(100, 32), (32, 32), (129, 64), (20, 32), (1, 32), (256, 16)])
def test_images_are_resampled_as_by_pillow(width, side):
    image = np.random.default_rng(0).integers(0, 256, (width, width, 4), np.uint8)
    image[..., 3] = 255  # Pillow weights colours by opacity
    image[: width // 2, :, 0] = 255  # an edge, where the filter overshoots
    code = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ resampled }} from {json.dumps(str(WEB / "pixels.js"))};
        const rgba = Uint8ClampedArray.from(JSON.parse(readFileSync(0, "utf-8")));
        console.log(JSON.stringify([...resampled(rgba, {width}, {side})]));
    """
    ours = np.array(node("--input-type=module", "-e", code, text=json.dumps(image.ravel().tolist()))).reshape(
        side, side, 4
    )
    theirs = np.array(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), int)
    assert np.abs(ours - theirs).max() <= 1


class StandIn:
    """A network of simple arithmetic, exact in float32; tests/export/web/programs.mjs has the same."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.rows = config, []

    def output(self, row):
        if isinstance(row, Encode):
            return (
                (row.pixels.ravel()[: np.prod(self.config.latent_shape)] / 64 - 2)
                .astype(np.float32)
                .reshape(self.config.latent_shape)
            )
        if isinstance(row, Decode):
            values = np.clip(np.floor(row.z.ravel() * 32) + 128, 0, 255).astype(np.uint8)
            return np.resize(values, self.config.pixel_shape)
        self.rows.append([float(np.float32(row.t)), row.label, row.z_t.ravel()])
        shift = (np.float32(row.t) + np.float32(row.t if row.r is None else row.r)) * np.float32(row.label / 16)
        return np.float32(0.75) * row.z_t + shift

    def run(self, rows):
        return [self.output(row) for row in rows]


def random_cases(rng, config, count):
    """Pairs of a task and its description for programs.mjs."""
    samplers = samplers_of(config.flow_map)
    for number in range(count):
        start, stop = sorted(rng.random(2)) if number % 3 == 0 else (0.0, 1.0)
        params = SamplingParams(
            seed=int(rng.integers(2**63)),
            index=int(rng.integers(5)),
            num_steps=int(rng.integers(1, 9)),
            sampler=samplers[number % len(samplers)],
            guidance_scale=float(rng.choice([1.0, 0.0, round(rng.random() * 9, 2)])),
            guidance_start=float(start),
            guidance_stop=float(stop),
            preview_every=int(rng.integers(3)),
        )
        label = int(rng.integers(20))
        pixels = rng.integers(0, 256, config.pixel_shape, np.uint8)
        mask = rng.random(config.pixel_shape[1:]) < 0.01 if number % 2 else None
        strength = float(rng.choice([1.0, 0.5, rng.random() * 0.9 + 0.1]))
        ends = [WalkEnd(int(rng.integers(20)), int(rng.integers(2**63)), int(rng.integers(3))) for _ in range(2)]
        fraction = float(rng.choice([0.0, 1.0, rng.random()]))
        common = {"params": to_api(params) | {"seed": str(params.seed)}, "every": params.preview_every}
        yield Generate(label, params), {"call": "generate", "labels": [[label, 1]], **common}
        yield (
            Edit(pixels, label, params, strength, mask),
            {
                "call": "edit",
                "pixels": pixels.ravel().tolist(),
                "label": label,
                "strength": strength,
                "mask": None if mask is None else mask.ravel().tolist(),
                **common,
            },
        )
        ends_of = [{"label": end.label, "seed": str(end.seed), "index": str(end.index)} for end in ends]
        names = {"start": ends_of[0], "end": ends_of[1], "fraction": fraction}
        yield Interpolate(ends[0], ends[1], fraction, params), {"call": "interpolate", **names, **common}
        yield Reconstruct(pixels), {"call": "reconstruct", "pixels": pixels.ravel().tolist(), **common}


@pytest.mark.parametrize("flow_map", [False, True])
def test_programs_yield_the_same_rows_and_images_as_ours(flow_map):
    config = replace(TINY, depth=3, flow_map=flow_map)
    tasks, cases = zip(*random_cases(np.random.default_rng(1), config, 40), strict=True)
    defaults = SamplingParams()
    common = {"config": shape_of(config), "settings": settings_of(config, defaults)}
    assert common["settings"].keys() == to_api(defaults).keys()
    found = node("tests/export/web/programs.mjs", text=json.dumps([{**common, **case} for case in cases]))
    for task, case, theirs in zip(tasks, cases, found, strict=True):
        engine, previews = StandIn(config), []
        program = task.program(config, lambda step, pixels, to=previews: to.append([step, pixels.ravel().tolist()]))
        rows = next(program)
        while True:
            try:
                rows = program.send(engine.run(rows))
            except StopIteration as stop:
                pixels = stop.value
                break
        assert [row[:2] for row in theirs["rows"]] == [row[:2] for row in engine.rows], case
        for ours, other in zip(engine.rows, theirs["rows"], strict=True):
            if case["call"] == "interpolate":  # NumPy adds up products in an order of its own
                np.testing.assert_allclose(np.float32(other[2]), ours[2], rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(np.float32(other[2]), ours[2])
        if case["call"] == "interpolate":
            assert np.abs(np.array(theirs["pixels"]) - pixels.ravel()).max() <= 1
        else:
            assert theirs["pixels"] == pixels.ravel().tolist()
            assert theirs["previews"] == previews


WRONG = [
    ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
    ({"steps": 2.5}, "steps must be a whole number from 1 to 1000, got 2.5"),
    ({"sampler": "ddim"}, 'sampler must be one of euler, heun, dpmpp_2m, got "ddim"'),
    ({"guidance": "4"}, 'guidance must be a number from 0 to 100, got "4"'),
    ({"guidance_start": 0.9, "guidance_stop": 0.1}, "must be times from 0 to 1 in this order, got 0.9 and 0.1"),
    (
        {"seed": -1},
        "seed must be a whole number from 0 to 9223372036854775807, beyond 2^53 a BigInt or a string of digits",
    ),
    ({"seed": 2**53 + 2}, "got 9007199254740994"),
    ({"seed": str(2**63)}, 'got "9223372036854775808"'),
    ({"seed": "1e3"}, 'got "1e3"'),
    ({"index": {}}, "index must be a whole number"),
]


def test_a_wrong_setting_is_a_sentence():
    code = f"""
        import {{ samplingParams }} from {json.dumps(str(WEB / "params.js"))};
        const settings = {json.dumps(settings_of(TINY, SamplingParams()))};
        const errorOf = (given) => {{
          try {{ samplingParams(settings, given); return ["none", ""]; }}
          catch (error) {{ return [error.name, error.message]; }}
        }};
        console.log(JSON.stringify({json.dumps([given for given, _ in WRONG])}.map(errorOf)));
    """
    for (given, says), (name, message) in zip(WRONG, node("--input-type=module", "-e", code), strict=True):
        assert name == "InputError" and says in message, (given, message)


def test_the_way_between_two_photos_is_that_of_the_programs():
    rng = np.random.default_rng(5)
    start, end = rng.standard_normal((2, 4, 8)).astype(np.float32)
    fractions = [0, 0.25, 0.5, 1]
    code = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ mixed }} from {json.dumps(str(WEB / "page/latents.js"))};
        const [start, end, fractions] = JSON.parse(readFileSync(0, "utf-8"));
        const between = (f) => [...mixed(Float32Array.from(start), Float32Array.from(end), f, 8)];
        console.log(JSON.stringify(fractions.map(between)));
    """
    text = json.dumps([start.ravel().tolist(), end.ravel().tolist(), fractions])
    found = node("--input-type=module", "-e", code, text=text)
    for fraction, latents in zip(fractions, found, strict=True):
        expected = between(start, end, fraction, on_sphere=False)
        np.testing.assert_allclose(np.reshape(latents, (4, 8)), expected, rtol=0, atol=1e-6)
