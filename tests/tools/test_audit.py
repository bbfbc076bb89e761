"""The audit finds releases with known vulnerabilities wherever they are allowed, and outdated locks."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.data import ROOT
from tools.audit import Holes, holes_found, locks_stale
from tools.check_image import sbom_faults

FILES = ("constraints.txt", "overrides.txt", "pyproject.toml", *(path.name for path in ROOT.glob("compose*.yaml")))


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that the audit reads."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "locks", tmp_path / "locks")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/known_holes.toml", tmp_path / "tools")
    return tmp_path


def audit(root, *arguments, **options):
    command = [sys.executable, ROOT / "tools/audit.py", "--root", root, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def found(root):
    """The findings of the audit, in this process."""
    return "\n".join([*holes_found(root, Holes(root / "tools/known_holes.toml")), *locks_stale(root)])


def change(path, pattern, new):
    """Replace the first match of a pattern, which must exist."""
    text, count = re.subn(pattern, new, path.read_text(), count=1, flags=re.MULTILINE)
    assert count == 1, pattern
    path.write_text(text)


def test_the_repository_has_no_known_vulnerability(tree):
    done = audit(tree)
    assert done.returncode == 0, done.stderr
    change(tree / "overrides.txt", r"^pillow==.+", "pillow==12.3.0")
    done = audit(tree)
    assert done.returncode == 1 and not done.stdout
    assert all(line.startswith("audit: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "file, pattern, new, says",
    [
        ("overrides.txt", r"^pillow==.+", "pillow==12.3.0", "overrides.txt: pillow 12.3.0 has known holes (CVE-"),
        ("constraints.txt", r"^Jinja2==.+", "Jinja2==3.1.5", "constraints.txt: jinja2 3.1.5 has known holes"),
        ("constraints.txt", r"^h11==.+", "h11==0.15.0rc1", "constraints.txt: h11 0.15.0rc1 has known holes"),
        ("locks/cpu.txt", r"^python-multipart==\S+", "python-multipart==0.0.26", "cpu.txt: python-multipart 0.0.26 h"),
        ("pyproject.toml", '"python-multipart>=.+?"', '"python-multipart>=0.0.20"', "admits python-multipart 0.0.20"),
        ("pyproject.toml", '"torch>=.+?"', '"torch"', "'torch' admits torch 0, which has known holes"),
        ("pyproject.toml", '"pillow>=.+?"', '"pillow>=11"', "'pillow>=11' admits pillow 11, which has known holes"),
        ("compose.monitoring.yaml", r"grafana:\d\S+", "grafana:12.1.0", "docker.io/grafana/grafana 12.1.0 has known"),
        ("compose.monitoring.yaml", r"prometheus:v\S+", "prometheus:v3.5.0", "docker.io/prom/prometheus 3.5.0 has"),
    ],
)  # fmt: skip
def test_a_release_with_known_vulnerabilities_is_found(tree, file, pattern, new, says):
    change(tree / file, pattern, new)
    assert says in found(tree)


@pytest.mark.parametrize(
    "file, pattern, new, says",
    [
        ("constraints.txt", r"^numpy==.+", "numpy==2.99", "but 2.99 elsewhere; run make locks"),
        ("pyproject.toml", '"fastapi>=', '"simple-thing>=1", "fastapi>=', "nothing for 'simple-thing>=1'"),
        ("pyproject.toml", '"fastapi>=.+?"', '"fastapi>=9"', "locks/ui.txt: nothing for 'fastapi>=9'"),
        ("pyproject.toml", '"pillow>=.+?"', '"pillow>=13"', "no requirement needs the accepted floor pillow 12.3"),
    ],
)  # fmt: skip
def test_an_outdated_file_is_found(tree, file, pattern, new, says):
    change(tree / file, pattern, new)
    assert says in found(tree)


def test_a_lock_without_hashes_is_found(tree):
    lock = tree / "locks/cpu.txt"
    lock.write_text("".join(line for line in lock.read_text().splitlines(True) if "--hash" not in line))
    assert "locks/cpu.txt: it has no hashes" in found(tree)


def test_the_locks_do_not_mention_the_build_machine():
    for path in (ROOT / "locks").glob("*.txt"):
        assert (
            "://" not in path.read_text()
            and "--index" not in path.read_text()
            and "--find-links" not in path.read_text()
        )


@pytest.mark.parametrize("known", [True, False])
def test_an_unreachable_database_is_not_reported_as_clean(tree, tmp_path, known):
    """pip-audit is replaced by a double that reports pillow 8 and every numpy, or nothing, as without a network."""
    (tmp_path / "pip_audit.py").write_text(
        "import json, sys\n"
        "pins = [line.split('==') for line in open(sys.argv[-1]).read().split()]\n"
        "bad = {'pillow': '8', 'numpy': ''} if " + str(known) + " else {}\n"
        "hole = {'id': 'PYSEC-1', 'fix_versions': ['99']}\n"
        "print(json.dumps({'dependencies': [\n"
        "    {'name': n, 'version': v, 'vulns': [hole] * (n in bad and v.startswith(bad[n]))} for n, v in pins]}))\n"
    )
    done = audit(tree, "--database", env={"PYTHONPATH": str(tmp_path)})
    if known:
        assert done.returncode == 1 and re.fullmatch("(audit: numpy .+: PYSEC-1, fixed in 99\n)+", done.stderr)
    else:
        assert (
            done.returncode == 0 and "PyPI's database was NOT checked: it lists no hole of pillow==8.0.0" in done.stdout
        )


def test_a_wrong_list_of_contents_is_found():
    def sbom(*pins):
        return {
            "components": [dict(zip(("name", "version"), pin.split("=="), strict=True)) for pin in pins],
            "metadata": {},
        }

    installed = {("numpy", "2.4.6"), ("prometheus-client", "0.26.0")}
    whole = sbom("numpy==2.4.6", "prometheus_client==0.26.0")
    assert sbom_faults(whole, installed, {"numpy": "2.4.6"}) == []
    assert sbom_faults(sbom("numpy==2.4.6"), installed, {}) == ["prometheus-client 0.26.0 is not listed"]
    assert sbom_faults(whole, installed, {"numpy": "2.4.5"}) == ["numpy 2.4.6 is not the locked 2.4.5"]
    assert sbom_faults(sbom("numpy==2.4.6", "prometheus_client==0.26.0", "torch==2.13.0"), installed, {}) == [
        "torch 2.13.0 is listed and not installed"
    ]


@pytest.mark.parametrize(("pillow", "warned"), [("12.3.0", True), ("13.0.0", False), ("13.1.0.dev1", False)])
def test_the_server_warns_of_a_vulnerable_pillow(pillow, warned):
    """dsd-serve starts until it finds that the model is missing."""
    code = f"import PIL.Image; PIL.__version__ = {pillow!r}; from server.main import main; main()"
    command = [sys.executable, "-c", code, "--model", "/does/not/exist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "/does/not/exist" in done.stderr, done.stderr
    sentence = f"Pillow {pillow} has known vulnerabilities, which 13 fixes: pip install --no-deps 'pillow>=13'"
    assert (sentence in done.stderr) == warned
