"""The list of files in docs/architecture.md is up to date."""

import subprocess
import sys

from tests.support.data import ROOT


def test_the_architecture_page_names_every_module():
    done = subprocess.run([sys.executable, "tools/tree.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
