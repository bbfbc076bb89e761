"""The commands, as a person meets them."""

import subprocess
import sys

import pytest

from tests.support.data import ROOT

COMMANDS = {
    "dsd-serve": "server.main",
    "dsd-train": "training",
    "dsd-export": "export",
    "dsd-ui": "ui.main",
    "dsd-generate": "dsd_serve.shell.generate_command",
    "dsd-image": "dsd_serve.shell.image_command",
    "dsd-verify": "dsd_serve.shell.verify_command",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    done = subprocess.run([sys.executable, "-m", COMMANDS[name], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name}")


def test_commands_work_from_a_wheel_in_another_folder(tmp_path):
    """All five packages and the data files are in the wheel."""
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "dsd_serve/imagenet1k.csv",
        "dsd_serve/demo/model.onnx",
        "dsd_serve/demo/model.ort.onnx",
        "dsd_serve/demo/model.safetensors",
        "server/app.py",
        "export/main.py",
        "ui/page.py",
        "training/configs/demo.toml",
    ):
        assert needed in names
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"dsd_serve", "training", "export", "server", "ui"}, (
        "tests, benchmarks, studies and tools stay out"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training", "nowhere.toml"], "dsd-train: there is no configuration file nowhere.toml"),
        (
            ["training", "training/configs/demo.toml", "data.path=/nowhere"],
            "dsd-train: data.path must be a folder",
        ),
        (["export", "nowhere.pt", "-o", "out"], "dsd-export: there is no checkpoint nowhere.pt"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *arguments, *([f"run.dir={tmp_path}"] if "data.path=/nowhere" in arguments else [])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "extra"), [("training", "train"), ("export", "export"), ("ui.main", "ui")])
def test_a_missing_extra_is_named(name, extra):
    code = (
        "import runpy, sys; sys.modules.update({'torch': None, 'gradio': None})\n"
        f"sys.argv = ['x']; runpy.run_module({name!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert f"pip install '.[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_bench_prints_the_machine_and_the_network(tiny_dir):
    command = [sys.executable, "-m", "benchmarks.engine_speed", "--model", str(tiny_dir), "--rows", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "machine" in done.stdout
    assert "of that" in done.stdout
    assert "times torch eager" in done.stdout
