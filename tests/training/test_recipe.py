"""The effect of each switch of the recipe, and the errors about its files."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsd_serve.checkpoint import read_checkpoint
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.network import DSD
from tests.support.runs import assert_same, train_until
from training.loss import Draws, Objective, pyramid_distance
from training.run_config import LossSection
from training.state import new_state
from training.teachers import MEAN, STD, VGG16, Lpips, VisionModel
from training.train import train

NETWORK = ModelConfig(image_size=16, patch_size=8, latent_dim=8, hidden_size=32, depth=2, num_heads=2)


def draw(**changes):
    return Draws.make(LossSection(num_draws=4, **changes), 500, (4, 8), torch.Generator().manual_seed(0))


def test_the_shift_moves_every_t_by_its_formula_and_nothing_else():
    plain, shifted = draw(), draw(t_shift=0.5)
    torch.testing.assert_close(shifted.t, 0.5 * plain.t / (1 - 0.5 * plain.t))
    assert shifted.t.mean() < plain.t.mean() - 0.1, "towards noise, which is t = 0"
    assert torch.equal(plain.noise, shifted.noise)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else(train_config):
    state = new_state(train_config("optim.name=muon"), torch.device("cpu"))
    of_muon = [p for group in state.muon.param_groups for p in group["params"]]
    of_adamw = [p for group in state.optimizer.param_groups for p in group["params"]]
    assert len(of_muon) == 2 * 7  # q, k, v, proj, gate, up, down of two blocks
    assert len(of_muon) + len(of_adamw) == len(list(state.objective.parameters()))
    assert not {id(p) for p in of_muon} & {id(p) for p in of_adamw}


def test_a_run_with_muon_resumes_bit_exactly(train_config, tmp_path):
    options = ["optim.name=muon", "run.save_every=3", "run.eval_every=100", "run.samples_per_class=0"]
    train(train_config("optim.steps=6", f"run.dir={tmp_path}/whole", *options))
    for last in (2, 6):
        train_until(train_config("optim.steps=6", f"run.dir={tmp_path}/part", *options), last)
    buffers = read_checkpoint(tmp_path / "part/checkpoint.pt")["muon"]["state"]
    assert len(buffers) == 14 and all(state["momentum_buffer"].abs().max() > 0 for state in buffers.values())
    assert_same(tmp_path / "whole/checkpoint.pt", tmp_path / "part/checkpoint.pt")


def test_the_pyramid_sees_all_frequencies_and_weighs_edges_more_than_l1():
    flat = torch.full((1, 3, 16, 16), 0.1)
    checks = 0.1 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)).expand(1, 3, 16, 16)
    zero = torch.zeros_like(flat)
    assert pyramid_distance(flat, flat) == 0
    # a constant is only in the last of the three bands, the finest pattern only in the first
    assert float(pyramid_distance(flat, zero)) == pytest.approx(0.1 / 3)
    assert float(pyramid_distance(checks, zero)) == pytest.approx(0.1 / 3)
    ramp = torch.linspace(-0.1, 0.1, 16).expand(1, 3, 16, 16)
    assert float(pyramid_distance(ramp, zero)) > float(ramp.abs().mean()) / 3


def step(config, features=None, perceptual=None, width=0):
    torch.manual_seed(0)
    model = DSD(NETWORK)
    draws = Draws.make(config, 2, NETWORK.latent_shape, torch.Generator().manual_seed(1))
    objective = Objective(model, config, perceptual, width)
    return objective, objective(model, torch.rand(2, 3, 16, 16), torch.tensor([1, 2]), draws, features)


def test_each_switch_adds_its_part_to_the_total():
    plain, (total, parts) = step(LossSection())
    _, (with_pyramid, more) = step(LossSection(pyramid_weight=2))
    assert set(more) - set(parts) == {"pyramid"}
    torch.testing.assert_close(with_pyramid, total + 2 * more["pyramid"])
    objective, (_, more) = step(
        LossSection(vision_weight=0.5, vision_model="vision.onnx"), torch.randn(2, 4, 6), width=6
    )
    assert set(more) - set(parts) == {"vision"}
    assert 0 <= more["vision"] <= 2
    more["vision"].backward()
    assert objective.model.patch_embed.proj.weight.grad is not None, "it reaches the encoder through z_t"
    perceptual = torch.nn.PairwiseDistance()
    perceptual.weight = torch.nn.Parameter(torch.zeros(1))
    objective, (_, more) = step(LossSection(lpips_weight=1, lpips_file="lpips.safetensors"), perceptual=perceptual)
    assert set(more) - set(parts) == {"lpips"}
    assert objective.state_dict().keys() == plain.state_dict().keys(), "frozen networks are not saved"


# Frozen networks.


def write_graph(path, prefix_tokens=0, size=32, pooled=False):
    """A vision model: the mean of each patch of 16 x 16 in each colour, as a map or as tokens behind a prefix."""
    import onnx
    from onnx import TensorProto, helper

    kernel = np.zeros((3, 3, 16, 16), np.float32)
    kernel[range(3), range(3)] = 1 / 256
    weights = [onnx.numpy_helper.from_array(kernel, "kernel")]
    nodes = [helper.make_node("Conv", ["pixels", "kernel"], ["map"], strides=[16, 16])]
    output, shape = "map", ["B", 3, size // 16, size // 16]
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["map"], ["out"], axes=[2, 3], keepdims=0))
        output, shape = "out", ["B", 3]
    if prefix_tokens:
        weights += [
            onnx.numpy_helper.from_array(np.array([0, 3, -1]), "tokens_shape"),
            onnx.numpy_helper.from_array(np.array([[0, 0], [prefix_tokens, 0], [0, 0]]).T.reshape(-1), "pads"),
        ]
        nodes += [
            helper.make_node("Reshape", ["map", "tokens_shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
            helper.make_node("Pad", ["tokens", "pads"], ["out"]),
        ]
        output, shape = "out", ["B", "N", 3]
    graph = helper.make_graph(
        nodes,
        "vision",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3, size, size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("prefix_tokens", [0, 1])
def test_a_vision_model_sees_the_images_on_the_grid_of_the_latents(tmp_path, prefix_tokens):
    """Images of 16 pixels go to the graph's 32; four patches are the four tokens, the class token is left out."""
    graph = write_graph(tmp_path / "vision.onnx", prefix_tokens)
    model = VisionModel(graph, 2, torch.device("cpu"))
    assert model.width == 3
    quarters = torch.tensor([[-1.0, 0.0], [0.5, 1.0]])
    images = quarters.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, 3, 16, 16)
    features = model(images)  # [1, 4, 3]
    expected = ((quarters.reshape(4, 1) + 1) / 2 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(features[0], expected, atol=0.15, rtol=0.05)  # bicubic blurs the borders


def test_a_run_is_aligned_to_a_vision_model(train_config, tmp_path):
    graph = write_graph(tmp_path / "vision.onnx")
    switches = [f"loss.vision_model={graph}", "loss.vision_weight=0.5", "run.log_every=1", "run.samples_per_class=0"]
    state = train(train_config("optim.steps=3", f"run.dir={tmp_path}/run", *switches))
    assert state.step == 3
    assert '"vision"' in (tmp_path / "run/metrics.jsonl").read_text()


def test_wrong_frozen_models_get_a_sentence(train_config, tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.vision_model must name a file"):
        train_config("loss.vision_weight=1")
    with pytest.raises(CheckpointError, match="does not exist"):
        VisionModel(tmp_path / "none.onnx", 2, torch.device("cpu"))
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"broken\.onnx is not an ONNX graph"):
        VisionModel(tmp_path / "broken.onnx", 2, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="without its pooling and head"):
        VisionModel(write_graph(tmp_path / "pooled.onnx", pooled=True), 2, torch.device("cpu"))


def write_lpips(path):
    """Random weights under the names and shapes of VGG16 and LPIPS."""
    generator = torch.Generator().manual_seed(0)
    weights, number, width = {}, 0, 3
    for stage, (channels, convolutions) in enumerate(VGG16):
        for _ in range(convolutions):
            shape = (channels, width, 3, 3)
            weights[f"features.{number}.weight"] = torch.randn(shape, generator=generator) * (2 / width / 9) ** 0.5
            weights[f"features.{number}.bias"] = torch.zeros(channels)
            number, width = number + 2, channels
        number += 1
        weights[f"lin{stage}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    save_file(weights, path)
    return weights


def test_lpips_is_a_distance_over_vgg16(tmp_path):
    weights = write_lpips(tmp_path / "lpips.safetensors")
    assert {"features.0.weight", "features.28.bias"} <= set(weights) and len(weights) == 2 * 13 + 5
    model = Lpips(tmp_path / "lpips.safetensors")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert model(images, images).tolist() == [0, 0]
    other = torch.zeros(2, 3, 32, 32, requires_grad=True)
    near, far = model(images, images + 0.05), model(images, other)
    assert near.shape == (2,) and (near > 0).all() and (near < far).all()
    far.sum().backward()
    assert torch.isfinite(other.grad).all() and other.grad.abs().max() > 0
    # the first stage alone, by hand
    x = (images - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
        :, None, None
    ]
    for number in (0, 2):
        x = torch.relu(torch.nn.functional.conv2d(x, weights[f"features.{number}.weight"], padding=1))
    torch.testing.assert_close(model.stages[0]((images - model.shift) / model.scale), x)


def test_wrong_lpips_weights_get_a_sentence(tmp_path):
    file = tmp_path / "lpips.safetensors"
    with pytest.raises(CheckpointError, match=r"must be a safetensors file, got .*lpips\.safetensors"):
        Lpips(file)
    weights = write_lpips(file)
    save_file({name: weight for name, weight in weights.items() if name != "features.5.bias"}, file)
    with pytest.raises(CheckpointError, match=r"features\.5\.bias must be of shape \[128\], it is missing"):
        Lpips(file)
    save_file({**weights, "lin4.model.1.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"lin4\.model\.1\.weight must be of shape .* it is of shape \[3\]"):
        Lpips(file)
