from dataclasses import replace

import pytest

from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.errors import ConfigError
from dsd_serve.network import DSD


@pytest.mark.parametrize(("name", "millions"), [("dsd-s", 42), ("dsd-m", 118), ("dsd-b", 205)])
def test_presets_have_the_sizes_of_the_paper(name, millions):
    import torch

    with torch.device("meta"):
        count = sum(p.numel() for p in DSD(PRESETS[name]).parameters())
    assert abs(count / 1e6 - millions) <= 0.03 * millions
    assert PRESETS[name].image_size == 256
    assert PRESETS[name].num_classes == 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 33}, "33 and 8"),
        ({"num_heads": 5}, "192 and 5"),
        ({"depth": 0}, "depth"),
        ({"latent_dim": "x"}, "latent_dim"),
        ({"prediction": "noise"}, "noise"),
        ({"flow_map": 1}, "flow_map must be true or false, got 1"),
        ({"flow_map": True, "depth": 2}, "depth of 3 or more"),
        ({"classes": [1000]}, "999"),
        ({"classes": [1, 1]}, "twice"),
        ({"dept": 3}, "dept"),
        ({"num_classes": -1}, "from 0 to 100000, got -1"),
        ({"num_classes": 1001}, "class_names must name all 1001"),
        ({"num_classes": 2, "class_names": ["cat"]}, "2 items, one for each class, got 1"),
        ({"num_classes": 1, "class_names": [" cat"]}, "without spaces around"),
        ({"num_classes": 1, "class_names": [""]}, "1 to 200 characters"),
        ({"num_classes": 1, "class_names": ["c" * 201]}, "1 to 200 characters"),
        ({"num_classes": 1, "class_names": [7]}, "texts of 1 to 200"),
        ({"num_classes": 1, "class_names": ["a\nb"]}, "control characters"),
        ({"num_classes": 1, "class_names": "a"}, "class_names of the model configuration must be a list"),
        ({"num_classes": 1, "class_wnids": ["n01"]}, "need class_names"),
    ],
)
def test_a_wrong_configuration_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict({**PRESETS["demo"].to_dict(), **change})


def test_an_incomplete_configuration_is_named():
    with pytest.raises(ConfigError, match="depth"):
        ModelConfig.from_dict({"image_size": 32, "patch_size": 8})


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_and_back(name):
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]
    assert not {"class_names", "flow_map"} & set(PRESETS[name].to_dict())
    flow_map = replace(PRESETS[name], flow_map=True)
    assert ModelConfig.from_dict(flow_map.to_dict()) == flow_map


def test_own_classes_to_dict_and_back():
    config = replace(PRESETS["demo"], num_classes=2, class_names=("金毛犬", "Café"), class_wnids=("n02099601", ""))
    assert config.to_dict()["class_names"] == ["金毛犬", "Café"]
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_model_without_classes_knows_only_the_null_label():
    config = replace(PRESETS["demo"], num_classes=0)
    assert (config.null_label, config.trained_classes) == (0, ())


def test_flops_count_what_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = PRESETS["demo"]
    model = DSD(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.denoise(torch.zeros(1, *config.latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert abs(counter.get_total_flops() / config.flops_per_row() - 1) < 0.02
    assert sum(weights.numel() for weights in model.parameters()) == config.num_parameters
