import copy

import pytest
import torch

from training.muon import BatchedMuon

SHAPES = [(32, 32), (96, 32), (32, 96), (96, 32), (32, 32), (32, 32)]
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}


def after(kind, steps, state=None, **changes):
    """The parameters and the optimiser after some steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(parameters, **{**SETTINGS, **changes})
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(steps):
        for parameter in parameters[1:]:  # the first is frozen
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("changes", [{}, {"nesterov": False}, {"adjust_lr_fn": None, "ns_steps": 3}], ids=str)
def test_updates_are_those_of_torch(changes):
    ours, _ = after(BatchedMuon, 3, **changes)
    theirs, _ = after(torch.optim.Muon, 3, **changes)
    start, _ = after(torch.optim.Muon, 0, **changes)
    assert torch.equal(ours[0], start[0]), "a parameter without a gradient stays"
    for a, b, before in zip(ours[1:], theirs[1:], start[1:], strict=True):
        assert torch.linalg.norm(a - b) < 0.02 * torch.linalg.norm(b - before)  # both multiply in bf16


def test_checkpoints_fit_both():
    _, ours = after(BatchedMuon, 2)
    _, theirs = after(torch.optim.Muon, 2)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for number in b["state"]:
        torch.testing.assert_close(a["state"][number]["momentum_buffer"], b["state"][number]["momentum_buffer"])
    after(BatchedMuon, 1, state=b)
    after(torch.optim.Muon, 1, state=a)


def test_the_number_of_operations_does_not_grow_with_the_number_of_matrices():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.products += "mm" in str(function)
            return function(*args, **(kwargs or {}))

    parameters = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(20)]
    optimizer = BatchedMuon(parameters, **SETTINGS)
    for parameter in parameters:
        parameter.grad = torch.randn(16, 16)
    with Count() as count:
        optimizer.step()
    assert count.products == 3 * 5, "three for each iteration"
