"""Frozen pretrained networks that losses use: a vision model to align with, and LPIPS.

Both are files of the user; nothing is downloaded.

A vision model is an ONNX graph with one input, float32 [B, 3, H, W] RGB normalised by ImageNet's mean and deviation,
and as first output its tokens [B, N, F] or feature map [B, F, h, w]. Of tokens, the last ones that form a square grid
are used: class and register tokens come before them. DINOv2 exported with torch.onnx is such a graph.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_serve.errors import CheckpointError

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of its five stages
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which vision models are usually normalised


class VisionModel:
    """`model(images)`: images [B, 3, S, S] in [-1, 1] -> features [B, G G, F] on a G x G grid, without gradient.

    The images are resized if the graph has a fixed size. Raises CheckpointError when the file is
    not such a graph.
    """

    def __init__(self, file: Path, grid_size: int, device: torch.device) -> None:
        self.file, self.grid_size, self.device = file, grid_size, device
        self.session = open_graph(file, device)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
            raise CheckpointError(f"{file} must have one input, float32 [B, 3, H, W]; it has {found}")
        self.input = inputs[0].name
        side = inputs[0].shape[2]
        self.size = side if isinstance(side, int) else None
        self.width = self(torch.zeros(1, 3, grid_size * 16, grid_size * 16, device=device)).shape[-1]

    def __call__(self, images: Tensor) -> Tensor:
        x = (images.float() + 1) / 2
        if self.size is not None and self.size != x.shape[-1]:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
        pixels = ((x - mean) / std).cpu().numpy()
        try:
            output = self.session.run(None, {self.input: pixels})[0]
        except Exception as error:  # ONNX Runtime raises its own types
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.file} cannot process images {list(pixels.shape)}: {reason}") from None
        return self.on_grid(torch.from_numpy(output)).to(self.device)

    def on_grid(self, output: Tensor) -> Tensor:
        """Tokens [B, N, F] or a map [B, F, h, w] -> [B, G G, F]."""
        if output.ndim == 3:
            side = math.isqrt(output.shape[1])
            output = output[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        if output.ndim != 4:
            raise CheckpointError(
                f"{self.file} must give tokens [B, N, F] or a map [B, F, h, w] as its first output, "
                f"it gives {list(output.shape)}; export the model without its pooling and head"
            )
        grid = F.interpolate(output.float(), (self.grid_size, self.grid_size), mode="bilinear", antialias=True)
        return grid.flatten(2).transpose(1, 2)


def open_graph(file: Path, device: torch.device) -> Any:
    try:
        import onnxruntime as ort
    except ImportError:
        raise CheckpointError("loss.vision_model needs ONNX Runtime: pip install '.[cpu]' or [gpu]") from None
    if not file.exists():
        raise CheckpointError(f"loss.vision_model names {str(file)!r}, which does not exist")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise CheckpointError("loss.vision_model on CUDA needs onnxruntime-gpu: pip install '.[gpu]'")
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0})]
    try:
        return ort.InferenceSession(str(file), providers=providers)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{file} is not an ONNX graph that can be run: {' '.join(str(error).split())[:300]}"
        ) from None


class Lpips(nn.Module):
    """LPIPS over VGG16 (arXiv 1801.03924), frozen: images x images [B, 3, S, S] in [-1, 1] -> distances [B].

    file: a safetensors file with VGG16's weights under torchvision's names (features.0.weight ...) and LPIPS's own
    under those of its vgg.pth (lin0.model.1.weight ...). With the package lpips and its weights, this writes it:

        weights = lpips.LPIPS(net="vgg").state_dict()  # net.slice1.0.weight ..., lin0.model.1.weight ...
        names = {name: re.sub(r"net.slice\\d", "features", name) for name in weights}
        safetensors.torch.save_file({names[name]: w for name, w in weights.items() if "lins" not in name}, file)

    Raises CheckpointError if a weight is missing or has another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        weights = read_tensors(file)
        self.stages = nn.ModuleList()
        number, width = 0, 3  # of the layer, as torchvision counts: convolutions, activations and poolings
        for stage, (channels, convolutions) in enumerate(VGG16):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage else []
            number += bool(stage)
            for _ in range(convolutions):
                layer = nn.Conv2d(width, channels, 3, padding=1)
                layer.weight.data = self.take(weights, f"features.{number}.weight", (channels, width, 3, 3))
                assert layer.bias is not None  # for mypy
                layer.bias.data = self.take(weights, f"features.{number}.bias", (channels,))
                layers += [layer, nn.ReLU()]
                number, width = number + 2, channels
            self.stages.append(nn.Sequential(*layers))
            lin = self.take(weights, f"lin{stage}.model.1.weight", (1, channels, 1, 1))
            self.register_buffer(f"lin{stage}", lin)
        self.register_buffer("shift", torch.tensor((-0.030, -0.088, -0.188))[:, None, None])
        self.register_buffer("scale", torch.tensor((0.458, 0.448, 0.450))[:, None, None])
        self.requires_grad_(False).eval()

    def take(self, weights: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in weights or tuple(weights[name].shape) != shape:
            found = f"of shape {list(weights[name].shape)}" if name in weights else "missing"
            raise CheckpointError(
                f"{self.file} must hold VGG16 and LPIPS; {name} must be of shape {list(shape)}, it is {found}"
            )
        return weights[name].float()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        features = (torch.cat([one, other]) - self.shift) / self.scale
        total = torch.zeros(len(one), device=one.device)
        for stage, layers in enumerate(self.stages):
            features = layers(features)  # [2 B, F, h, w]
            # inside the root, because its slope at 0 is infinite and rectified features are often all 0
            unit = features.float() / (features.float().square().sum(1, keepdim=True) + 1e-10).sqrt()
            difference = (unit[: len(one)] - unit[len(one) :]).square()
            total = total + (getattr(self, f"lin{stage}") * difference).sum(1).mean((1, 2))
        return total


def read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"loss.lpips_file must be a safetensors file, got {file}: {error}") from None
