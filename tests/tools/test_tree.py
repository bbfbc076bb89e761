"""The tree of modules: its page is up to date, names are unique, and no module is long."""

import subprocess
import sys
from collections import Counter

from tests.support.data import ROOT

PACKAGES = ("dsd_serve", "training", "export", "server", "ui", "benchmarks", "studies", "tools")
MODULES = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
ENTRANCES = ("__init__", "__main__", "main", "app")
MOST_LINES = 350


def test_the_architecture_page_names_every_module():
    done = subprocess.run([sys.executable, "tools/tree.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_name_occurs_once():
    names = Counter(file.stem for file in MODULES if file.stem not in ENTRANCES)
    assert len(names) > 100
    assert [name for name, number in names.items() if number > 1] == []


def test_no_module_is_longer_than_can_be_read_at_once():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in MODULES}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES} == {}
