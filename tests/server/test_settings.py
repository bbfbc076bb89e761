"""Settings as operators give them: flags, variables, the file of keys, and what is wrong with them."""

import math
import os
import pkgutil
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd_serve.backends.triton.addresses import parse_addresses
from dsd_serve.errors import ConfigError
from server.keys import find, load_keys
from server.settings import RANGES, Settings, parse_settings, variable
from server.stray_variables import unknown_variables
from tests.support.data import ROOT

DEFAULTS = vars(Settings())
NUMBERS = {name: type(value) for name, value in DEFAULTS.items() if type(value) in (int, float)}
SECRET = "0123456789abcdef"
COMMANDS = {
    "dsd-serve": "server.main:main",
    "dsd-train": "training.train:main",
    "dsd-export": "export.main:main",
    "dsd-ui": "ui.main:main",
    "dsd-eval": "training.evaluation.main:main",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DSD_")]:
        monkeypatch.delenv(name)


def start(*arguments, **environment):
    """A server that cannot start: its stderr."""
    command = [sys.executable, "-m", "server.main", "--port", "0", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


def by_flag(name, text):
    return parse_settings([f"--{name.replace('_', '-')}={text}"])


def by_variable(name, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable(name), str(text))
        return parse_settings([])


def test_every_number_has_a_finite_range_with_the_default_in_it():
    assert sorted(RANGES) == sorted(NUMBERS)
    for name, (least, most) in RANGES.items():
        assert 0 <= least <= DEFAULTS[name] <= most <= 1e6


WRONG = [
    *("inf", "-inf", "Infinity", "nan", "NaN", "1e308", "-1", "-0.001", "1e-320", "1_000", "1__0", "８", "٣", "²"),
    *("0x10", "1,5", "5 MB", "--", "true", "None", "1e", "1\n2", "9" * 5000, "9" * 90 + "." * 90, "é" * 500),
]


@pytest.mark.parametrize("set_", [by_flag, by_variable])
@given(name=st.sampled_from(sorted(NUMBERS)), text=st.sampled_from(WRONG) | st.text(min_size=1, max_size=30))
def test_a_number_is_within_its_range_or_refused_in_one_sentence(set_, name, text):
    text = re.sub("[\0\ud800-\udfff]", "x", text)  # cannot stand in an environment
    if set_ is by_variable and not text.strip():
        return
    related = {"max_uploads_mb", "max_body_mb", "http_workers"}  # one may be too small for the others
    least, most = RANGES[name]
    try:
        value = getattr(set_(name, text), name)
    except ConfigError as error:
        sentence = str(error)
        assert len(sentence) < 400 and sentence.isprintable()
        source = name if set_ is by_flag else variable(name)
        kind = "an integer" if NUMBERS[name] is int else "a number"
        if name not in related or "twice" not in sentence:
            assert f"{source} must be {kind} from {least} to {most}, got " in sentence
    else:
        assert type(value) is NUMBERS[name] and math.isfinite(value) and least <= value <= most
        assert text not in WRONG or (text, least) == ("1e-320", 0)


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"max_uploads_mb", "max_body_mb", "http_workers"}))
def test_both_ends_of_a_range_are_taken_and_what_is_beyond_them_is_not(name):
    least, most = RANGES[name]
    for value in (least, most):
        assert getattr(by_flag(name, value), name) == getattr(by_variable(name, value), name) == value
    for value in (least - 1, most + 1):
        for set_, source in ((by_flag, name), (by_variable, variable(name))):
            with pytest.raises(ConfigError, match=rf"{source} must be an? \w+ from"):
                set_(name, value)


def test_an_empty_variable_is_unset():
    for name in DEFAULTS:
        for text in ("", "  "):
            assert by_variable(name, text) == Settings(), name
    assert by_variable("port", " 81 ").port == 81
    with pytest.raises(ConfigError, match="port must be an integer from 0 to 65535, got ''"):
        by_flag("port", "")


def test_the_variable_that_kubernetes_makes_of_a_service_is_explained():
    with pytest.raises(ConfigError, match=r"DSD_PORT must be an integer .*enableServiceLinks: false"):
        by_variable("port", "tcp://10.0.0.1:8000")
    with pytest.raises(ConfigError) as error:
        by_variable("port", "http")
    assert "Kubernetes" not in str(error.value)


def test_a_variable_without_effect_causes_a_warning():
    links = {
        "DSD_SERVICE_HOST": "10.0.0.1",
        "DSD_SERVICE_PORT": "8000",
        "DSD_SERVICE_PORT_HTTP": "8000",
        "DSD_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "DSD_PORT_8000_TCP_ADDR": "10.0.0.1",
        "DSD_UI_PORT": "tcp://10.0.0.2:7860",
        "DSD_UI_SERVICE_HOST": "10.0.0.2",
    }
    right = {variable(name): "x" for name in DEFAULTS} | {"DSD_API_KEYS": "x", "DSD_API_KEY": "x", "PATH": "x"}
    assert unknown_variables({**links, **right}) == []
    assert unknown_variables({"DSD_PROT": "my-secret", "DSD_APIKEYS": "my-secret", "DSD_QQQQ": "x"}) == [
        "the variable DSD_APIKEYS has no effect: did you mean DSD_API_KEYS?",
        "the variable DSD_PROT has no effect: did you mean DSD_PORT?",
        "the variable DSD_QQQQ has no effect: dsd-serve --help lists the variables",
    ]
    errors = start("--model", "/nowhere", DSD_PROT="1")
    assert "WARNING server.main: the variable DSD_PROT has no effect: did you mean DSD_PORT?" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "magic"], "engine must be one of onnx, torch, tensorrt, got 'magic'"),
        (["--precision", "fp64"], "precision must be one of auto, fp32, fp16, bf16, int8, got 'fp64'"),
        (["--device", "gpu"], "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:-1"], "device must be cpu, cuda or cuda:N"),
        (["--log-level", "x" * 999], "log_level must be one of debug, info, warning, error, got 'xxxx"),
        (["--max-body-mb", "150"], "max_uploads_mb must be at least twice max_body_mb, got 200 and 150"),
        (["--ui=yes"], "argument --ui: ignored explicit argument 'yes'"),
    ],
)
def test_wrong_choices_are_refused(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse_settings(arguments)
    assert words in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cors-origins", "a.example"],
        ["--triton", "nohost:8001:3"],
        ["--api-keys", "/"],
        ["--row-budget", "1000000000"],
    ],
)
def test_errors_are_reported_before_the_model_is_loaded(arguments):
    errors = start("--model", "/nowhere", *arguments)
    assert errors.splitlines()[-1].startswith("dsd-serve: ") and "Traceback" not in errors
    assert "/nowhere" not in errors


@pytest.mark.parametrize(
    "text",
    [
        *("nohost:8001:3", "::1:8001", "host:0", "host:65536", "host:８001", "host:+1", "a b:8001", ":8001", "host:"),
        *("http://host:8001", "host/x:8001", "[::1]", "[x]:8001", "a:1,,b:2", "ü:8001", "host:" + "9" * 5000),
    ],
)
def test_addresses_of_triton_that_cannot_be(text):
    with pytest.raises(ConfigError, match=r"triton must be HOST:PORT") as error:
        parse_addresses(text)
    assert len(str(error.value)) < 300
    assert parse_addresses("a.b-c_d:8001, [::1]:8001,[fe80::1%eth0]:1") == [
        "a.b-c_d:8001",
        "[::1]:8001",
        "[fe80::1%eth0]:1",
    ]


# The file of keys.


@pytest.mark.parametrize(
    "text",
    [
        f"alice:{SECRET} # laptop",
        f"\ufeffalice:{SECRET}\n",
        f"# who\r\n\r\nalice:{SECRET}\r\n",
        f"  alice : {SECRET} \t# bob:{SECRET}",
        f"\n\n   \n#\nalice:{SECRET}",
        f"#a\ralice:{SECRET}\r",
    ],
)
def test_comments_and_what_editors_write_do_not_belong_to_a_key(tmp_path, text):
    (tmp_path / "keys").write_bytes(text.encode())
    (key,) = load_keys(str(tmp_path / "keys"), {})
    assert key.name == "alice" and find([key], SECRET) is key


def test_a_sign_inside_a_key_belongs_to_it(tmp_path):
    (tmp_path / "keys").write_text(f"alice:{SECRET}#1:60:4 # limits\n")
    (key,) = load_keys(str(tmp_path / "keys"), {})
    assert find([key], SECRET + "#1") is key and (key.per_minute, key.images_at_once) == (60, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (f"alice:{SECRET} laptop", "no spaces"),
        (f"alice:{SECRET}\u00e9", "ASCII"),
        (f"alice:{SECRET}\0", "ASCII"),
        (f"alice:{SECRET}\u00a0", "ASCII"),
        ("alice:" + "x" * 1025, "at most 1024"),
        ("alice:", "at least 16"),
        (f":{SECRET}", "the name in line 1"),
        (f"älice:{SECRET}", "the name in line 1"),
        (f"alice:{SECRET}:-1", "must be name:key"),
        (f"alice:{SECRET}:٣", "must be name:key"),
        (f"alice:{SECRET}:1e3", "must be name:key"),
        (f"alice:{SECRET}:" + "9" * 400, "must be name:key"),
        (f"alice:{SECRET}:1:2:3", "must be name:key"),
        (f"alice:{SECRET}".encode("utf-16"), "it is not UTF-8"),
        (f"alice:{SECRET}".encode("utf-16-le"), "the name in line 1"),
        (b"\xff", "it is not UTF-8"),
        (b"", "holds no API key"),
        (b"#" * 1_000_001, "larger than 1 MB"),
    ],
)
def test_wrong_lines_of_the_file_are_refused(tmp_path, data, words):
    (tmp_path / "keys").write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ConfigError, match=words) as error:
        load_keys(str(tmp_path / "keys"), {})
    assert SECRET not in str(error.value) and str(error.value).isprintable()


def test_keys_of_the_variable_have_no_comments():
    with pytest.raises(ConfigError, match="key 1 of DSD_API_KEYS"):
        load_keys("", {"DSD_API_KEYS": f"alice:{SECRET} # laptop"})


# Versions, and an environment without anything.


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name, capsys):
    with pytest.raises(SystemExit) as ended:
        pkgutil.resolve_name(COMMANDS[name])(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(rf"{name} \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_imports_of_the_page_need_no_variables():
    command = [sys.executable, "-c", "import ui, pydub"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={})
    assert done.returncode == 0, done.stderr
