"""Augmentation of a micro-batch: flips, square crops and changes of colour, in this order.

The paper states that there is augmentation, not which. What is drawn depends on the place of the micro-batch in the run
only, so a run resumes exactly. Both networks see the augmented image; the masks of the loss come after it, and are for
the online encoder alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from training.run_config import DataSection

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness (ITU-R BT.601)


def augment(images: Tensor, data: DataSection, generator: torch.Generator) -> Tensor:
    """Images [B, 3, S, S] in [-1, 1], each changed by random numbers of its own; the same where all is off."""
    device = generator.device

    def uniform(count: int, low: float, high: float) -> Tensor:
        """[count, B, 1, 1, 1]"""
        shape = count, len(images), 1, 1, 1
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    if data.flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if data.crop < 1:
        (area,), places = uniform(1, data.crop, 1), uniform(2, -1, 1)
        images = crop(images, area.sqrt(), places)
    if data.colour:
        images = recolour(images, *uniform(3, 1 - data.colour, 1 + data.colour))
    return images


def crop(images: Tensor, side: Tensor, places: Tensor) -> Tensor:
    """A square of each image, scaled back to the whole size by cubic interpolation.

    side [B, 1, 1, 1]: share of the image's side, up to 1. places [2, B, 1, 1, 1]: of the square in x and y, from -1, at
    one border, to 1, at the other.
    """
    side, (x, y) = side.flatten(), (place.flatten() for place in places)
    zero = torch.zeros_like(side)
    rows = torch.stack([side, zero, (1 - side) * x]), torch.stack([zero, side, (1 - side) * y])
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(images.shape), align_corners=False)  # [B, S, S, 2]
    return F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)


def recolour(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Images whose brightness, contrast and saturation are multiplied by factors [B, 1, 1, 1] around 1."""
    light = (images + 1) * brightness / 2  # [0, 1] and above
    weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
    light = torch.lerp((light * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True), light, contrast)
    light = torch.lerp((light * weights).sum(1, keepdim=True), light, saturation)
    return (2 * light - 1).clamp(-1, 1)
