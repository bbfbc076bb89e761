import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter

from dsd_serve.config import PRESETS
from dsd_serve.errors import ConfigError
from training import device
from training.device import Device, choose_device, distributed

NETWORK = PRESETS["demo"]


def test_a_driver_that_torch_cannot_use_is_not_passed_over(train_config, monkeypatch, tmp_path):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")

    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=r"too old .*; update the driver .* or set run\.device=cpu"):
        choose_device(train_config("run.device=auto"), NETWORK)
    assert choose_device(train_config("run.device=cpu"), NETWORK).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device(train_config("run.device=auto"), NETWORK).device.type == "cpu"


def test_processes_of_a_machine_do_not_share_a_gpu(train_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"run\.device must be cuda for the 2 processes .* got 'cuda:1'"):
        choose_device(train_config("run.device=cuda:1"), NETWORK)


def test_bf16_that_is_emulated_is_not_chosen(monkeypatch):
    """A T4 emulates it: is_bf16_supported() is true there by default."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not device.gpu_multiplies_bf16()


def test_a_network_of_several_processes_is_compiled_as_a_whole(monkeypatch, tmp_path):
    counter, compile_it = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_it(module, backend=counter))
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layers = [torch.nn.Linear(1024, 1024) for _ in range(16)]  # 64 MiB, and a bucket has 25
        forward = distributed(torch.nn.Sequential(*layers), Device(torch.device("cpu"), False, True, world=2))
        forward(torch.ones(1, 1024)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 1
