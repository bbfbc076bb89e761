from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.network import DSD, patchify, to_images, to_pixels, unpatchify

CONFIG = ModelConfig(image_size=16, patch_size=4, latent_dim=8, hidden_size=32, depth=3, num_heads=2)


@pytest.fixture(scope="module")
def model() -> DSD:
    torch.manual_seed(0)
    model = DSD(CONFIG).eval()
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.5)  # as after training: conditioning has an effect
    return model


@given(counts=st.tuples(*[st.integers(0, 3)] * 3))
@settings(deadline=None, max_examples=20)
def test_the_unified_forward_equals_the_three_roles(model, counts):
    encode, denoise, decode = counts
    generator = torch.Generator().manual_seed(sum(counts))
    pixels = torch.randint(0, 256, (encode, *CONFIG.pixel_shape), dtype=torch.uint8, generator=generator)
    z_t = torch.randn(denoise, *CONFIG.latent_shape, generator=generator)
    t = torch.rand(denoise, generator=generator)
    labels = torch.randint(0, 1001, (denoise,), generator=generator)
    z = torch.randn(decode, *CONFIG.latent_shape, generator=generator)
    with torch.no_grad():
        encoded, denoised, decoded = model(pixels, z_t, t, labels, z)
        if encode:
            torch.testing.assert_close(encoded, model.encode(to_images(pixels)), atol=1e-5, rtol=1e-5)
        if denoise:
            torch.testing.assert_close(denoised, model.denoise(z_t, t, labels), atol=1e-5, rtol=1e-5)
        if decode:
            difference = decoded.int() - to_pixels(model.decode(z)).int()
            assert difference.abs().max() <= 1
    assert (len(encoded), len(denoised), len(decoded)) == counts


def test_latents_are_normalised(model):
    z = model.encode(torch.rand(3, *CONFIG.pixel_shape) * 2 - 1)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(3, 16), atol=1e-2, rtol=0)


def test_outputs_depend_on_the_conditioning(model):
    z_t = torch.randn(1, *CONFIG.latent_shape).expand(3, -1, -1)
    out = model.denoise(z_t, torch.tensor([0.2, 0.8, 0.2]), torch.tensor([5, 5, 6]))
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert (out[0] - out[2]).abs().max() > 1e-3


def flow_map_of(model: DSD) -> DSD:
    """A flow map with the weights of a model."""
    flow_map = DSD(replace(model.config, flow_map=True)).eval()
    flow_map.load_state_dict(model.state_dict())
    return flow_map


def test_a_flow_map_with_r_equal_to_t_is_the_network_without(model):
    flow_map = flow_map_of(model)
    z_t, t, labels = torch.randn(3, *CONFIG.latent_shape), torch.tensor([0.0, 0.3, 0.9]), torch.tensor([5, 6, 1000])
    pixels = torch.randint(0, 256, (2, *CONFIG.pixel_shape), dtype=torch.uint8)
    expected = model(pixels, z_t, t, labels, z_t)
    for r in ((), (t,)):
        for output, other in zip(flow_map(pixels, z_t, t, labels, z_t, *r), expected, strict=True):
            torch.testing.assert_close(output, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow_map.denoise(z_t, t, labels), expected[1], atol=1e-5, rtol=1e-5)


def test_r_reaches_only_the_last_third_of_the_blocks_of_denoise_rows(model):
    flow_map = flow_map_of(model)
    z_t, t, labels = torch.randn(2, *CONFIG.latent_shape), torch.tensor([0.2, 0.2]), torch.tensor([5, 5])
    r = torch.tensor([0.2, 1.0])
    outputs = flow_map(torch.zeros(0, *CONFIG.pixel_shape, dtype=torch.uint8), z_t, t, labels, z_t, r)
    torch.testing.assert_close(outputs[1][0], model.denoise(z_t, t, labels)[0], atol=1e-5, rtol=1e-5)
    assert (outputs[1] - model.denoise(z_t, t, labels))[1].abs().max() > 1e-3
    assert (outputs[2].int() - to_pixels(model.decode(z_t)).int()).abs().max() <= 1
    tapped = [flow_map.trunk(*flow_map.embed_noised(z_t, t, labels, r), tap=2)[1] for r in (None, r)]
    assert torch.equal(*tapped)


def test_patchify_and_back():
    images = torch.rand(2, 3, 16, 16)
    patches = patchify(images, 4)
    assert patches.shape == (2, 16, 48)
    torch.testing.assert_close(unpatchify(patches, 4), images, atol=0, rtol=0)
    torch.testing.assert_close(patches[0, 1].reshape(3, 4, 4), images[0, :, :4, 4:8], atol=0, rtol=0)


def test_pixels_survive_the_normalisation():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_images(pixels)), pixels)
    assert torch.equal(to_pixels(torch.tensor([-9.0, 9.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_a_velocity_network_returns_clean_estimates():
    """At t near 1 a bounded velocity hardly moves z_t."""
    torch.manual_seed(0)
    model = DSD(ModelConfig(**{**PRESETS["demo"].to_dict(), "prediction": "velocity", "classes": ()}))
    z_t = torch.randn(2, *PRESETS["demo"].latent_shape)
    with torch.no_grad():
        z_hat = model.denoise(z_t, torch.full((2,), 0.999), torch.tensor([1, 2]))
    assert (z_hat - z_t).abs().max() < 0.05
