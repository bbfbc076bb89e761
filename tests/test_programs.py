from dataclasses import replace

import numpy as np
import pytest

from dsd_serve.engines import load_engine
from dsd_serve.errors import InputError
from dsd_serve.params import MAX_SEED, SamplingParams
from dsd_serve.programs import generate, reconstruct, run, run_all


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_same_seed_gives_the_same_picture(engine, sampler, guidance):
    params = SamplingParams(seed=4, num_steps=5, sampler=sampler, guidance_scale=guidance)
    first, again = (run(engine, generate(engine.config, 207, params)) for _ in range(2))
    assert first.shape == engine.config.pixel_shape
    assert np.array_equal(first, again)
    other = run(engine, generate(engine.config, 207, replace(params, seed=5)))
    assert not np.array_equal(first, other)


def test_image_i_of_a_request_is_that_of_its_index(engine):
    programs = [generate(engine.config, 1, SamplingParams(seed=9, index=i, num_steps=3)) for i in range(3)]
    together = run_all(engine, programs)
    alone = run(engine, generate(engine.config, 1, SamplingParams(seed=9, index=2, num_steps=3)))
    assert np.array_equal(together[2], alone)
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_previews_come_on_time_and_change_nothing(engine, sampler):
    seen = []
    params = SamplingParams(seed=1, num_steps=7, sampler=sampler, preview_every=2, guidance_scale=2.0)
    with_previews = run(engine, generate(engine.config, 950, params, lambda step, pixels: seen.append((step, pixels))))
    assert [step for step, _ in seen] == [2, 4, 6]
    assert all(pixels.shape == engine.config.pixel_shape for _, pixels in seen)
    assert np.array_equal(with_previews, run(engine, generate(engine.config, 950, params)))


def test_reconstruct_is_encode_then_decode(engine):
    pixels = np.random.default_rng(0).integers(0, 256, engine.config.pixel_shape, dtype=np.uint8)
    program = reconstruct(pixels)
    assert [type(row).__name__ for row in next(program)] == ["Encode"]
    assert run(engine, reconstruct(pixels)).shape == pixels.shape


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"num_steps": True}, "num_steps"),
        ({"sampler": "ddim"}, "euler, heun, dpmpp_2m"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"preview_every": -1}, "preview_every"),
    ],
)
def test_wrong_parameters_are_named(wrong, named):
    with pytest.raises(InputError, match=named):
        SamplingParams(**wrong)
