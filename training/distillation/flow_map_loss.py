"""The objective of distillation: jumps along the guided teacher's trajectories, in one row each.

A jump from z_t to the trajectory's point z_r is the clean estimate whose velocity leads there:

    z_hat(z_t, t, r) = z_t + (1 - t) (z_r - z_t) / (r - t)

and that is the target of the student's estimate (regression, as in progressive distillation, arXiv 2202.00512, but for
every pair of points). Jumps to r = 1 end in an image: the frozen teacher decodes it, and pixels and the teacher's own
hidden states of the image are compared with those of the trajectory's end. Rows with r = t keep the velocity, which
other samplers and edits need; encode and decode rows are held to the teacher's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_serve.flow import add_noise, from_velocity, jump
from dsd_serve.network import DSD
from training.augmentation import augment
from training.distillation.distill_config import DistillLossSection, JumpSection
from training.distillation.teacher import Teacher, column, draw_trajectories, even_times
from training.loss import NetworkObjective, distance, pyramid_distance
from training.run_config import DataSection

# The teacher's images are few in kind: varied like this, they stand for those that users encode.
VARIED = DataSection(crop=0.6, colour=0.2)
DECODED_T = 0.7  # lowest t of the noise of latents that are decoded


@dataclass
class JumpBatch:
    """The rows of one micro-batch and their targets.

    Jumps: z_t [J, L, C], t, r and labels [J], target [J, L, C]; the last B of them go to r = 1, and end in `image`
    [B, 3, S, S], whose hidden states are `hidden` [2, B, L, W]. Flow: F rows with r = t, flow_z_t [F, L, C] to
    flow_target [F, L, C]. Roles: E images [E, 3, S, S] and their latents [E, L, C], D latents decode_z [D, L, C] and
    their images decoded [D, 3, S, S]. Images are in [-1, 1], labels int64.
    """

    z_t: Tensor
    t: Tensor
    r: Tensor
    labels: Tensor
    target: Tensor
    image: Tensor
    hidden: Tensor
    flow_z_t: Tensor
    flow_t: Tensor
    flow_labels: Tensor
    flow_target: Tensor
    images: Tensor
    latents: Tensor
    decode_z: Tensor
    decoded: Tensor


def look(network: DSD, images: Tensor) -> tuple[Tensor, Tensor]:
    """images [B, 3, S, S] -> their latents [B, L, C], and hidden states [2, B, L, W] of the middle and the end."""
    hidden, middle = network.trunk(*network.embed_images(images), tap=max(1, network.config.depth // 2))
    return network.to_latents(hidden), torch.stack([middle.float(), hidden.float()])


class FlowMapObjective(NetworkObjective):
    """The student; `forward` gives the loss and its parts."""

    def __init__(self, model: DSD, teacher: DSD, config: DistillLossSection) -> None:
        super().__init__()
        self.frozen = (teacher,)  # in a tuple, so that it is not a submodule: neither trained nor saved
        self.model, self.config = model, config

    def forward(self, rows: JumpBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and its unweighted parts by name."""
        (teacher,) = self.frozen
        model, jumps, ends = self.model, len(rows.t), len(rows.image)
        z_hat = model.denoise(
            torch.cat([rows.z_t, rows.flow_z_t]),
            torch.cat([rows.t, rows.flow_t]),
            torch.cat([rows.labels, rows.flow_labels]),
            torch.cat([rows.r, rows.flow_t]),
        )
        between, end, flow = z_hat.split([jumps - ends, ends, len(rows.flow_t)])
        parts = {
            "jump": F.mse_loss(between, rows.target[:-ends]),
            "end": F.mse_loss(end, rows.target[-ends:]),
            "flow": F.mse_loss(flow, rows.flow_target),
        }
        if self.config.image_weight or self.config.feature_weight:
            image = teacher.decode(end)
            parts["image"] = F.l1_loss(image, rows.image) + pyramid_distance(image, rows.image)
            if self.config.feature_weight:
                parts["feature"] = distance(look(teacher, image)[1], rows.hidden)
        if self.config.encode_weight:
            parts["encode"] = F.mse_loss(model.encode(rows.images), rows.latents)
        if self.config.decode_weight:
            parts["decode"] = F.l1_loss(model.decode(rows.decode_z), rows.decoded)
        total = torch.stack([getattr(self.config, f"{name}_weight") * part for name, part in parts.items()]).sum()
        return total, parts


class BatchMaker:
    """Makes micro-batches: the teacher draws, the student's own jumps are tried, and pairs of points are chosen.

    The networks are compiled where `compiled` says so.
    """

    def __init__(self, teacher: Teacher, student: DSD, compiled: bool) -> None:
        def fast(function):  # type: ignore[no-untyped-def]
            return torch.compile(function) if compiled else function

        self.teacher, self.config = teacher, student.config
        network = teacher.network
        self.denoise, self.decode, self.student = fast(network.denoise), fast(network.decode), fast(student.denoise)
        self.look = fast(lambda images: look(network, images))

    @torch.no_grad()
    def make(self, batch: int, steps: int, jumps: JumpSection, generator: torch.Generator) -> JumpBatch:
        """`batch` trajectories of so many steps, and rows on them: a function of the networks and the generator."""
        device, classes = generator.device, torch.tensor(self.config.drawable_labels, device=generator.device)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        def below(limit: Tensor | int, count: int) -> Tensor:
            """Whole numbers [count] from 0 to limit - 1."""
            return (uniform(count) * limit).long()

        null = self.config.null_label
        labels = classes[below(len(classes), batch)]
        labels = torch.where(uniform(batch) < jumps.class_dropout, null, labels)
        noise = torch.randn(batch, *self.config.latent_shape, generator=generator, device=device)
        times = even_times(batch, steps, generator, device)
        drawn = draw_trajectories(self.denoise, noise, labels, times, self.teacher.guidance, null)

        # jumps between any two points, and one of each trajectory to its end
        row = torch.arange(batch, device=device).repeat(jumps.per_trajectory)
        start = torch.where(uniform(len(row)) < jumps.from_noise, 0, below(steps, len(row)))
        stop = start + 1 + below(steps - start, len(row))
        own = torch.arange(batch, device=device)
        last = torch.where(uniform(batch) < jumps.from_noise, 0, below(steps, batch))
        z_last, t_last = drawn.z[own, last], times[own, last]
        if jumps.rolled_out:
            zero = torch.zeros_like(t_last)
            reached = jump(self.student(noise, zero, labels, t_last).float(), noise, 0.0, column(t_last))
            rolled = (uniform(batch) < jumps.rolled_out) & (last > 0)
            z_last = torch.where(column(rolled), reached, z_last)
        z_t, t = torch.cat([drawn.z[row, start], z_last]), torch.cat([times[row, start], t_last])
        z_r, r = torch.cat([drawn.z[row, stop], drawn.z[:, -1]]), torch.cat([times[row, stop], torch.ones_like(t_last)])
        target = from_velocity((z_r - z_t) / column(r - t), z_t, column(t))

        here = below(steps, batch)
        without = uniform(batch) < 0.3
        flow_target = torch.where(column(without), drawn.null_estimates[own, here], drawn.estimates[own, here])

        clean = drawn.z[:, -1]
        image = self.decode(clean)
        _, hidden = self.look(image)
        half = max(1, batch // 2)
        images = augment(image[:half].clamp(-1, 1), VARIED, generator)
        latents, _ = self.look(images)
        decode_z = torch.cat([latents, clean[half:]])
        decode_t = DECODED_T + (1 - DECODED_T) * uniform(len(decode_z))
        decode_z = add_noise(
            decode_z, torch.randn(decode_z.shape, generator=generator, device=device), column(decode_t)
        )
        return JumpBatch(
            z_t=z_t,
            t=t,
            r=r,
            labels=torch.cat([labels[row], labels]),
            target=target,
            image=image,
            hidden=hidden,
            flow_z_t=drawn.z[own, here],
            flow_t=times[own, here],
            flow_labels=torch.where(without, null, labels),
            flow_target=flow_target,
            images=images,
            latents=latents,
            decode_z=decode_z,
            decoded=self.decode(decode_z),
        )
