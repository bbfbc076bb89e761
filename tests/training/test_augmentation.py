"""Flips, crops and changes of colour: what they do, and that they depend on the place in the run only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.augmentation import augment, crop, recolour
from training.run_config import DataSection

ONE = torch.ones(1, 1, 1, 1)
OFF = DataSection(flip=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ramp(size=32):
    """One image whose red grows to the right and whose green grows downwards, from -0.9 to 0.9; blue is 0."""
    line = torch.linspace(-0.9, 0.9, size)
    return torch.stack([line.expand(size, size), line[:, None].expand(size, size), torch.zeros(size, size)])[None]


def test_with_all_off_images_stay_and_nothing_is_drawn():
    images, one = torch.rand(3, 3, 8, 8) * 2 - 1, generator()
    assert augment(images, OFF, one) is images
    assert torch.equal(one.get_state(), generator().get_state())


def test_flips_are_drawn_as_they_were_before_there_was_more():
    images = torch.rand(64, 3, 8, 8, generator=generator(5)) * 2 - 1
    flipped = augment(images, DataSection(), generator())
    mirrored = torch.rand(64, 1, 1, 1, generator=generator()) < 0.5
    assert (
        torch.equal(flipped, torch.where(mirrored, images.flip(-1), images)) and mirrored.any() and not mirrored.all()
    )


def test_a_crop_keeps_a_square_of_the_image():
    """Of half the side, in the middle, at the left and in the right lower corner: the ramp shows where it lies."""
    for x, y in ((0, 0), (-1, 0), (1, 1)):
        out = crop(ramp(), 0.5 * ONE, torch.tensor([x, y], dtype=torch.float32).view(2, 1, 1, 1, 1))
        middle, reach = 0.5 * 0.93 * torch.tensor([x, y]), 0.45
        red, green = out[0, 0, 16], out[0, 1, :, 16]
        assert float(red.mean()) == pytest.approx(float(middle[0]), abs=0.05)
        assert float(green.mean()) == pytest.approx(float(middle[1]), abs=0.05)
        assert float(red[-1] - red[0]) == pytest.approx(2 * reach, abs=0.06)
    whole = crop(ramp(), ONE, torch.zeros(2, 1, 1, 1, 1))
    torch.testing.assert_close(whole, ramp(), atol=1e-5, rtol=0)


def test_factors_of_colour():
    images = torch.rand(2, 3, 8, 8, generator=generator(1)) * 1.6 - 0.8
    ones = torch.ones(2, 1, 1, 1)
    torch.testing.assert_close(recolour(images, ones, ones, ones), images)
    brighter = recolour(images, 1.1 * ones, ones, ones)
    torch.testing.assert_close(brighter, ((images + 1) * 1.1 - 1).clamp(-1, 1))
    grey = recolour(images, ones, ones, 0 * ones)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    flat = recolour(images, ones, 0 * ones, ones)
    assert flat.flatten(1).std(1).max() < 1e-5
    less = recolour(images, ones, 0.5 * ones, ones)
    torch.testing.assert_close(less.std((2, 3)), 0.5 * images.std((2, 3)))


@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.05, 1),
    colour=st.floats(0, 1),
    flip=st.booleans(),
    count=st.integers(1, 5),
    size=st.integers(4, 20),
)
def test_any_setting_gives_images_of_the_same_kind_and_the_same_every_time(share, colour, flip, count, size):
    data = DataSection(crop=share, colour=colour, flip=flip)
    images = torch.rand(count, 3, size, size, generator=generator(2)) * 2 - 1
    first, again = (augment(images, data, generator(7)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == images.shape
    assert torch.isfinite(first).all() and first.abs().max() <= 1
    if share < 1 or colour > 0.01:
        assert not torch.equal(first, augment(images, data, generator(8)))
