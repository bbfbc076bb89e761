"""Links of the documentation site that lead nowhere are found, those within it and to other sites are not reported."""

import subprocess
import sys

from tests.support.data import ROOT


def check(site):
    return subprocess.run([sys.executable, ROOT / "tools/site_links.py", site], capture_output=True, text=True)


def test_a_link_to_a_page_that_was_not_built_is_found(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "my image.png").touch()
    (tmp_path / "index.html").write_text(
        '<a href="web/#part">1</a> <a href="web">2</a> <a href="#part">3</a> <a href="https://other.example/x">4</a> '
        '<a href="mailto:a@other.example">5</a> <a href="try/index.html#draw?class=1">6</a> <img src="my%20image.png">'
    )
    (tmp_path / "web/index.html").write_text(
        '<a href="/">1</a> <a href="../try/">2</a> <script src="./page.js"></script>'
    )
    done = check(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "index.html: try/index.html#draw?class=1 leads to no file",
        "web/index.html: ../try/ leads to no file",
        "web/index.html: ./page.js leads to no file",
    ]
    (tmp_path / "try").mkdir()
    (tmp_path / "try/index.html").write_text("<p>built")
    (tmp_path / "web/page.js").touch()
    done = check(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_not_a_site_is_refused(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 1
    assert "is not a site: it has no index.html" in done.stderr
