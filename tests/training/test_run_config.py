"""Every field of the configuration: type, limits, allowed words, and the sentences about wrong values."""

import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from dsd_serve.errors import ConfigError
from tests.support.data import ROOT
from training.run_config import TrainConfig, load_config

DEMO = ROOT / "training/configs/demo.toml"
FIELDS = [
    (section, name, field)
    for section, of_section in TrainConfig.model_fields.items()
    for name, field in of_section.annotation.model_fields.items()
]


def refusal(section, name, value):
    """The error about this value, which begins with the key and ends with the value."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({section: {name: value}})
    sentence = str(caught.value)
    assert sentence.startswith(f"{section}.{name} must be ") and sentence.endswith(f", got {value!r}"), sentence
    return sentence


def of_type(*types):
    """(section, name, field) of the fields that take one of these types, as "float" or "int | None"."""
    return [item for item in FIELDS if item[2].annotation in types]


def limits(field):
    """{"ge": 0, ...} of a field."""
    return {
        name: getattr(limit, name) for limit in field.metadata for name in ("gt", "ge", "le") if hasattr(limit, name)
    }


NUMBERS = of_type(int, float, int | None)
WORDS = [item for item in FIELDS if get_origin(item[2].annotation) is Literal]
NEED_FILES = ("lpips_weight", "vision_weight")


def test_the_fields_are_of_known_types():
    """Guards that the tests below cover all fields."""
    tested = {f"{section}.{name}" for section, name, _ in NUMBERS + WORDS + of_type(bool, str)}
    lists = {"data.classes", "model.class_names", "optim.betas", "optim.frozen"}
    assert {f"{section}.{name}" for section, name, _ in FIELDS} - tested == lists
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("section", "name", "field"), NUMBERS)
def test_a_number_is_neither_text_nor_a_bool_nor_a_list(section, name, field):
    kind = "float" if field.annotation is float else "int"
    for value in ("3", "", True, False, [1], {"a": 1}):
        assert f"must be of type {kind}, got" in refusal(section, name, value)
    if kind == "int":
        for value in (1.5, 2.0, float("nan"), float("inf")):
            assert "must be of type int, got" in refusal(section, name, value)


@pytest.mark.parametrize(("section", "name", "field"), [x for x in of_type(float) if x[1] not in NEED_FILES])
def test_a_whole_number_becomes_a_float(section, name, field):
    value = getattr(getattr(TrainConfig.from_dict({section: {name: 1}}), section), name)
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize(("section", "name", "field"), [item for item in NUMBERS if item[2].metadata])
def test_a_number_has_limits(section, name, field):
    bounds = limits(field)
    if field.annotation is float:
        refusal(section, name, float("nan"))
        refusal(section, name, -float("inf"))
    assert refusal(section, name, -1).endswith(
        ("must be above 0, got -1", "must be 0 or more, got -1", "must be between 0 and 1, got -1")
    )
    if "gt" in bounds:
        assert refusal(section, name, 0).endswith("must be above 0, got 0")
    if "le" in bounds:
        assert refusal(section, name, 1.5).endswith("must be between 0 and 1, got 1.5")
        assert refusal(section, name, float("inf")).endswith("must be between 0 and 1, got inf")


@pytest.mark.parametrize(("section", "name", "field"), WORDS)
def test_a_word_is_one_of_a_list(section, name, field):
    allowed = get_args(field.annotation)
    for word in allowed:
        assert getattr(getattr(TrainConfig.from_dict({section: {name: word}}), section), name) == word
    for value in ("unknown", allowed[0].upper(), "", 3, None):
        assert f"must be one of {', '.join(allowed)}, got" in refusal(section, name, value)


@pytest.mark.parametrize(("section", "name", "field"), of_type(bool, str))
def test_text_and_bools_are_strict(section, name, field):
    kind = field.annotation.__name__
    for value in (1, 1.0, None, ["a"], True if kind == "str" else "true"):
        assert f"must be of type {kind}, got" in refusal(section, name, value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lrr=1", "unknown key optim.lrr; did you mean lr? known are batch_size, betas, ema_decay, frozen, "),
        ("optm.lr=1", "unknown key optm; did you mean optim? known are data, loss, model, monitor, optim, run"),
        ("optim.lr=fast", "optim.lr must be of type float, got 'fast'"),
        ("optim.lr=-1", "optim.lr must be above 0, got -1"),
        ("optim.steps=1.5", "optim.steps must be of type int, got 1.5"),
        ("optim.batch_size=10", "optim.batch_size must be a multiple of optim.micro_batch_size, got 10 and 64"),
        ("optim.betas=[0.9]", r"optim.betas must be 2 numbers, got [0.9]"),
        ("optim.betas=[0.9, 0.95, 0.99]", r"optim.betas must be 2 numbers, got [0.9, 0.95, 0.99]"),
        ("optim.betas=[0.9, true]", "optim.betas must be of type float, got True"),
        ("loss.objective=dds", "loss.objective must be one of dsd, stop_gradient, naive, got 'dds'"),
        ("loss.class_dropout=2", "loss.class_dropout must be between 0 and 1, got 2"),
        ("loss.alignment_layer=99", "loss.alignment_layer must be at most the depth, 6, got 99"),
        ("loss.lpips_weight=1", "loss.lpips_weight is above 0, so loss.lpips_file must name a file"),
        ("loss.vision_weight=1", "loss.vision_weight is above 0, so loss.vision_model must name a file"),
        ("data.classes=3", "data.classes must be a list, got 3"),
        ("data.classes=abc", "data.classes must be a list, got 'abc'"),
        ("optim.frozen=blocks", "optim.frozen must be a list, got 'blocks'"),
        ("optim.frozen=[1]", "optim.frozen must be of type str, got 1"),
        ("data.classes=[1, 2.0]", "data.classes must be a list of names or labels, got 2.0"),
        ("data.classes=['cat', true]", "data.classes must be a list of names or labels, got True"),
        ("data.crop=0", "data.crop must be above 0: images are cropped to this share of their area, got 0"),
        ("model.num_classes=3", "model.num_classes must be the number of model.class_names, 0, or without names 1000"),
        ("model.class_names=['a', 'a ']", "class_names must be texts of 1 to 200 characters without spaces around"),
        ("model.preset=huge", "model.preset must be one of dsd-s, dsd-m, dsd-b, demo, got 'huge'"),
        ("model.depth=0", "depth must be a whole number from 1 to 1024, got 0"),
        ("run.device", "an override must be section.key=value, got 'run.device'"),
        ("data.flip=1", "data.flip must be of type bool, got 1"),
    ],
)
def test_a_wrong_key_or_value_is_named(override, named):
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [override])
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize("section", TrainConfig.model_fields)
def test_a_section_holds_keys(section):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict({section: 3})
    assert str(caught.value) == f"{section} must be a section with keys, got 3"


def test_a_configuration_is_frozen_and_survives_a_round_trip():
    config = load_config(DEMO, ["model.depth=2", "optim.lr=1", "optim.betas=[0, 1]"])
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 2.0
    assert config.optim.betas == (0.0, 1.0) and config.network_config().depth == 2
    assert TrainConfig.from_dict(config.to_dict()) == config


SHIPPED = [path for path in sorted((ROOT / "training/configs").glob("*.toml")) if not path.stem.startswith("distill-")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    assert load_config(path).run.dir == f"runs/{path.stem}"


def test_a_missing_and_a_broken_file_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[optim\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfeo", "is not UTF-8"),
        (None, "is a folder; the configuration must be a TOML file"),
    ],
)
def test_a_file_that_is_no_text(tmp_path, data, words):
    file = tmp_path / "a.toml"
    file.write_bytes(data) if data else file.mkdir()
    with pytest.raises(ConfigError, match=words):
        load_config(file, [])


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "a.toml"
    file.write_bytes(b"\xef\xbb\xbf[optim]\nlr = 0.5\n")
    assert load_config(file, ["data.path=nowhere"]).optim.lr == 0.5


def test_reading_a_configuration_needs_no_torch():
    code = "import sys, training.run_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
