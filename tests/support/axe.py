"""axe-core in a page of a test: the violations of WCAG 2.2 A and AA that it finds."""

from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "npm" / "node_modules" / "axe-core" / "axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def violations(page: Any, *more: str) -> list[str]:
    """A line for each violation on a page of Playwright: the rule, the element and what is wrong.

    more: names of rules of axe-core to check besides WCAG's. Skips without axe-core.
    """
    if not SCRIPT.exists():
        pytest.skip("this test needs axe-core: make tests/support/npm/node_modules/.done")
    if not page.evaluate("'axe' in globalThis"):
        page.evaluate(SCRIPT.read_text(encoding="utf-8"))
    options = {"runOnly": {"type": "tag", "values": RULES}, "rules": {name: {"enabled": True} for name in more}}
    found = page.evaluate("options => axe.run(options)", options)
    return [
        f"{violation['id']}: {node['html']} {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
