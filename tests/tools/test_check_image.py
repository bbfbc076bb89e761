"""The check of the Docker image: what may not be inside it, and that our own packages are not taken for that."""

import pytest

from tests.support.data import ROOT
from tools.check_image import FORBIDDEN

LIBRARIES = "/opt/dsd/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    "path",
    [
        f"{LIBRARIES}/torch/__init__.py",
        f"{LIBRARIES}/triton/backends/driver.py",
        "/usr/lib/python3/dist-packages/gradio/__init__.py",
        "/usr/bin/gcc-12",
        "/usr/bin/x86_64-linux-gnu-gcc",
        "/usr/local/cuda/bin/nvcc",
    ],
)
def test_torch_and_compilers_are_found(path):
    assert FORBIDDEN.search(path)


def test_our_own_packages_are_none_of_them():
    modules = [path.relative_to(ROOT) for name in ("dsd_serve", "server") for path in (ROOT / name).rglob("*.py")]
    assert len(modules) > 100
    assert not [path for path in modules if FORBIDDEN.search(f"{LIBRARIES}/{path}")]
