"""Muon with one batch of matrix products for all matrices of a shape: torch's Muon launches about 25 kernels for each.

On a GPU the 3,600 kernels of a step of dsd-s take 5 to 13 % of it. State and settings are those of torch.optim.Muon, so
checkpoints fit both; sums are in another order.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon as of_torch


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, and the same update. Its learning-rate factors are those of torch."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if not parameters:
                continue
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            of_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for number, parameter in enumerate(parameters):
                of_shape[parameter.shape].append(number)
            for shape, numbers in of_shape.items():
                updates = orthogonal(torch.stack([ahead[number] for number in numbers]), group)
                lr = of_torch._adjust_lr(group["lr"], group["adjust_lr_fn"], shape)
                torch._foreach_add_(
                    [parameters[number] for number in numbers], [*updates.to(parameters[0].dtype)], alpha=-lr
                )


def orthogonal(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """The Newton-Schulz iteration of torch.optim.Muon on matrices [N, A, B]: roughly the nearest orthogonal ones."""
    a, b, c = group["ns_coefficients"]
    wide = matrices.bfloat16()  # [N, A, B], and transposed where A > B
    tall = wide.shape[1] > wide.shape[2]
    wide = wide.mT if tall else wide
    wide = wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.mT  # [N, A, A]
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide
