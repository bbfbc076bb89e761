from dataclasses import replace

import numpy as np
import pytest

from dsd_serve.engines import load_engine
from dsd_serve.errors import InputError
from dsd_serve.flow import add_noise
from dsd_serve.params import MAX_SEED, SamplingParams
from dsd_serve.programs import (
    between,
    decode,
    edit,
    encode,
    generate,
    reconstruct,
    run,
    run_all,
    sampling_cost,
    tokens_of,
)
from dsd_serve.rows import Denoise
from dsd_serve.samplers import initial_noise
from tests.support.data import sample_image


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_same_seed_gives_the_same_image(engine, sampler, guidance):
    params = SamplingParams(seed=4, num_steps=5, sampler=sampler, guidance_scale=guidance)
    first, again = (run(engine, generate(engine.config, 207, params)) for _ in range(2))
    assert first.shape == engine.config.pixel_shape
    assert np.array_equal(first, again)
    other = run(engine, generate(engine.config, 207, replace(params, seed=5)))
    assert not np.array_equal(first, other)


def test_image_i_of_a_request_has_index_i(engine):
    programs = [generate(engine.config, 1, SamplingParams(seed=9, index=i, num_steps=3)) for i in range(3)]
    together = run_all(engine, programs)
    alone = run(engine, generate(engine.config, 1, SamplingParams(seed=9, index=2, num_steps=3)))
    assert np.array_equal(together[2], alone)
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_previews_come_at_their_steps_and_change_nothing(engine, sampler):
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


def test_encode_and_decode_are_the_halves_of_reconstruct(engine):
    pixels = sample_image(207, 0, size=16)
    z = run(engine, encode(pixels))
    assert z.shape == engine.config.latent_shape
    assert np.array_equal(run(engine, decode(z)), run(engine, reconstruct(pixels)))


def rows_of(program, engine):
    """All rows that a program yields, tick by tick."""
    ticks, outputs = [], None
    while True:
        try:
            rows = next(program) if outputs is None else program.send(outputs)
        except StopIteration as stop:
            return ticks, stop.value
        ticks.append(rows)
        outputs = engine.run(rows)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("strength", [None, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0, "guidance_start": 0.3, "guidance_stop": 0.7}])
def test_the_cost_of_a_task_is_exact(engine, sampler, strength, guidance):
    params = SamplingParams(num_steps=9, sampler=sampler, preview_every=2, **guidance)
    if strength is None:
        program = generate(engine.config, 1, params, lambda *_: None)
    else:
        pixels = sample_image(1, 1, size=16)
        program = edit(engine.config, pixels, 1, params, strength, on_preview=lambda *_: None)
    ticks, _ = rows_of(program, engine)
    cost = sampling_cost(params, strength)
    assert (sum(map(len, ticks)), len(ticks)) == (cost.rows, cost.ticks)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_flow_map_costs_a_row_a_step_and_jumps_to_the_next_time(flow_map_dir, steps):
    engine = load_engine("onnx", flow_map_dir)
    params = SamplingParams(num_steps=steps, sampler="flow_map")
    ticks, _ = rows_of(generate(engine.config, 1, params), engine)
    assert (sum(map(len, ticks)), len(ticks)) == (sampling_cost(params).rows, steps + 1)
    times = [row.t for (row,) in ticks[:-1]]
    assert [row.r for (row,) in ticks[:-1]] == [*times[1:], 1.0]


def test_outside_its_interval_guidance_costs_nothing_and_changes_nothing(engine):
    params = SamplingParams(
        seed=2, num_steps=10, sampler="euler", guidance_scale=3.0, guidance_start=0.4, guidance_stop=0.6
    )
    ticks, _ = rows_of(generate(engine.config, 1, params), engine)
    guided = {round(rows[0].t, 6) for rows in ticks[:-1] if len(rows) == 2}
    assert guided == {0.4, 0.5, 0.6}
    never = replace(params, guidance_start=0.95, guidance_stop=0.99)
    off = replace(params, guidance_scale=1.0)
    assert np.array_equal(*(run(engine, generate(engine.config, 1, p)) for p in (never, off)))


def test_several_labels_are_averaged(engine):
    params = SamplingParams(seed=3, num_steps=1, sampler="euler")
    noise = initial_noise(3, 0, engine.config.latent_shape)
    a, b = engine.run([Denoise(noise, 0.0, 1), Denoise(noise, 0.0, 207)])
    expected = run(engine, decode(0.25 * a + 0.75 * b))
    drawn = run(engine, generate(engine.config, {1: 0.25, 207: 0.75}, params))
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_full_strength_forgets_the_image_and_less_keeps_more(demo_dir):
    engine = load_engine("onnx", demo_dir)
    params = SamplingParams(seed=1, num_steps=12, sampler="euler")
    one, other = sample_image(1, 0, size=32), sample_image(950, 3, size=32)
    forgotten = [run(engine, edit(engine.config, p, 207, params, 1.0)) for p in (one, other)]
    assert np.array_equal(*forgotten)
    assert np.array_equal(forgotten[0], run(engine, generate(engine.config, 207, params)))
    kept = run(engine, reconstruct(one)).astype(int)
    changes = [np.abs(run(engine, edit(engine.config, one, 207, params, s)) - kept).mean() for s in (0.05, 0.5, 1.0)]
    assert changes == sorted(changes)
    assert changes[0] < changes[2] / 3


def test_editing_begins_on_the_path_between_noise_and_image(engine):
    params = SamplingParams(seed=5, index=2, num_steps=10, sampler="euler")
    pixels = sample_image(1, 0, size=16)
    ticks, _ = rows_of(edit(engine.config, pixels, 207, params, 0.3), engine)
    first = ticks[1][0]
    assert first.t == pytest.approx(0.7)
    assert len(ticks) == 1 + 3 + 1, "the share of the steps that the strength asks for, between the borders"
    noise = initial_noise(5, 2, engine.config.latent_shape)
    assert np.allclose(first.z_t, add_noise(run(engine, encode(pixels)), noise, 0.7), atol=1e-6)


def test_a_mask_draws_inside_and_keeps_every_pixel_outside(engine):
    params = SamplingParams(seed=1, num_steps=6, sampler="heun", guidance_scale=2.0)
    pixels = sample_image(1, 0, size=16)
    mask = np.zeros((16, 16), bool)
    mask[2:7, 9:] = True
    ticks, drawn = rows_of(edit(engine.config, pixels, 207, params, 1.0, mask), engine)
    assert np.array_equal(drawn[:, ~mask], pixels[:, ~mask])
    assert not np.array_equal(drawn[:, mask], pixels[:, mask])
    known = ~tokens_of(mask, engine.config.patch_size)[:, 0]
    assert known.any() and not known.all()
    z, noise = run(engine, encode(pixels)), initial_noise(1, 0, engine.config.latent_shape)
    for rows in ticks[1:-1]:
        straight = add_noise(z, noise, rows[0].t)
        assert np.allclose(rows[0].z_t[known], straight[known], atol=1e-4), "known tokens stay on their path"


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_a_wrong_strength_is_named(engine, strength):
    with pytest.raises(InputError, match="strength must be above 0"):
        run(engine, edit(engine.config, sample_image(1, 0, size=16), 1, SamplingParams(), strength))


@pytest.mark.parametrize("on_sphere", [True, False])
def test_a_walk_includes_its_ends_and_keeps_the_norm(on_sphere):
    shape = (64, 16)
    a, b = (initial_noise(seed, 0, shape) for seed in (1, 2))
    if not on_sphere:
        a, b = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (a, b))
    assert np.array_equal(between(a, b, 0, on_sphere=on_sphere), a)
    assert np.array_equal(between(a, b, 1, on_sphere=on_sphere), b)
    middle = between(a, b, 0.5, on_sphere=on_sphere)
    assert middle.dtype == np.float32
    assert middle.std() == pytest.approx(1, abs=0.03), "the mean of two noises would have 0.71"
    assert np.linalg.norm(middle - a) == pytest.approx(np.linalg.norm(middle - b), rel=0.02)
    assert np.array_equal(between(a, a, 0.3, on_sphere=True), a)


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
        ({"guidance_start": 0.7, "guidance_stop": 0.3}, "guidance_start"),
        ({"guidance_stop": 1.5}, "guidance_stop"),
        ({"guidance_start": float("nan")}, "guidance_start"),
    ],
)
def test_wrong_parameters_are_named(wrong, named):
    with pytest.raises(InputError, match=named):
        SamplingParams(**wrong)
