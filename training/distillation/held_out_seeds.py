"""Held-out seeds: how close a student's images are to the teacher's own for the same noise and class."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_serve.flow import jump
from dsd_serve.network import DSD, to_pixels
from dsd_serve.samplers import initial_noise
from training.device import Device
from training.distillation.distill_config import DistillConfig
from training.distillation.teacher import Teacher, column, draw_trajectories, even_times
from training.evaluation.distances import latent_psnr
from training.journal import write_png

SEED = 2**40  # the images of small seeds are those that users look at
BATCH = 128
JUMPS = (1, 2, 4)
SHOWN = 10  # classes in the grid


class HeldOutSeeds:
    """Noise [N, L, C] and labels int64 [N] that no step trains on, and the teacher's latents and images of them."""

    def __init__(self, teacher: Teacher, config: DistillConfig, where: Device) -> None:
        self.teacher, self.where, self.shown = teacher.network, where, config.run.samples_per_class
        network = teacher.network.config
        classes, count = network.drawable_labels, config.run.held_out_seeds
        self.labels = torch.tensor([classes[i % len(classes)] for i in range(count)], device=where.device)
        noise = [torch.from_numpy(initial_noise(SEED, i, network.latent_shape)) for i in range(count)]
        self.noise = torch.stack(noise).to(where.device)
        with where.computing():
            ends = [
                draw_trajectories(
                    teacher.network.denoise,
                    part,
                    labels,
                    even_times(len(part), config.teacher.steps, None, where.device),
                    teacher.guidance,
                    network.null_label,
                ).z[:, -1]
                for part, labels in zip(self.noise.split(BATCH), self.labels.split(BATCH), strict=True)
            ]
        self.ends = torch.cat(ends)

    @torch.no_grad()
    def drawn(self, student: DSD, jumps: int, count: int | None = None) -> Tensor:
        """Latents of the first `count` seeds, in so many jumps."""
        parts = []
        with self.where.computing():
            for z, labels in zip(self.noise[:count].split(BATCH), self.labels[:count].split(BATCH), strict=True):
                for i in range(jumps):
                    t, r = (torch.full((len(z),), (i + k) / jumps, device=z.device) for k in (0, 1))
                    z = jump(student.denoise(z, t, labels, r).float(), z, column(t), column(r))
                parts.append(z)
        return torch.cat(parts)

    @torch.no_grad()
    def measure(self, student: DSD) -> dict[str, float]:
        """By name: latent_psnr_1, _2, _4, the mean over seeds in dB; and how far encode and decode rows are from the
        teacher's, encode_psnr (latents) and decode_psnr (images), both of the teacher's images."""
        teacher = self.ends.cpu().numpy()
        numbers = {
            f"latent_psnr_{n}": float(latent_psnr(self.drawn(student, n).cpu().numpy(), teacher).mean()) for n in JUMPS
        }
        z = self.ends[:BATCH]
        with self.where.computing():
            images = self.teacher.decode(z).clamp(-1, 1)
            pairs = {
                "encode_psnr": (student.encode(images), self.teacher.encode(images), 1.0),
                "decode_psnr": (student.decode(z).clamp(-1, 1), images, 4.0),  # images span 2
            }
        for name, (ours, theirs, power) in pairs.items():
            error = F.mse_loss(ours.float(), theirs.float()).clamp(min=1e-12)
            numbers[name] = float(10 * torch.log10(power / error))
        return numbers

    @torch.no_grad()
    def write_images(self, path: Path, student: DSD) -> None:
        """A grid, a row for each of the first seeds: the student's images in 1, 2 and 4 jumps, and the teacher's."""
        if not self.shown:
            return
        count = min(SHOWN, len(self.labels))
        with self.where.computing():
            columns = [student.decode(self.drawn(student, n, count)) for n in JUMPS]
            columns.append(self.teacher.decode(self.ends[:count]))
        pixels = [to_pixels(images.float()).cpu().numpy() for images in columns]
        write_png(path, [column[i] for i in range(count) for column in pixels], columns=len(columns))
