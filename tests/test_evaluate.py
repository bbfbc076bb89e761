import numpy as np
import torch

from dsd_serve.engines import load_engine
from dsd_serve.images import psnr
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate, reconstruct, run, run_all
from training.data import Pictures
from training.evaluate import draw, found


def test_the_classifier_chooses_among_the_classes_of_the_model():
    """A classifier that answers by brightness, and loves a class that is not among the model's."""

    def classifier(images):
        scores = torch.zeros(len(images), 1000)
        scores[:, 500] = 9
        scores[:, 207] = images.mean((1, 2, 3))
        return scores

    bright, dark = np.full((6, 3, 8, 8), 250, np.uint8), np.full((4, 3, 8, 8), 10, np.uint8)
    labels = np.array([207] * 5 + [1] + [1] * 4)
    right = found(classifier, np.concatenate([bright, dark]), labels, (207, 1))
    assert right.tolist() == [True] * 5 + [False] + [True] * 4


def test_samples_take_the_classes_in_turn_and_are_those_of_their_index(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    params = SamplingParams(seed=8, num_steps=2)
    pictures, labels = draw(engine, 52, params)
    assert labels[:4].tolist() == [1, 207, 950, 1]
    assert len(pictures) == 52
    last = generate(engine.config, int(labels[51]), SamplingParams(seed=8, index=51, num_steps=2))
    assert np.array_equal(pictures[51], run(engine, last))


def test_the_demo_model_reconstructs_held_out_pictures(demo_dir, real_data):
    engine = load_engine("onnx", demo_dir)
    path = real_data / "tiny-imagenet-200/validation-00000-of-00001.parquet"
    held = Pictures(str(path), engine.config.image_size, engine.config.classes)
    held.hold()
    rebuilt = np.stack(run_all(engine, [reconstruct(pixels) for pixels in held.pixels]))
    quality = psnr(held.pixels, rebuilt)
    print(f"{len(held)} pictures: {quality:.2f} dB")
    assert quality >= 20
