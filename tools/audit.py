"""Find libraries with known vulnerabilities. Prints a sentence for each finding; exits with 1 if there is one.

python tools/audit.py               checks the exact versions in constraints.txt, overrides.txt, locks/, compose*.yaml
                                    and tests/clients, and the lowest versions that pyproject.toml allows, against
                                    tools/known_holes.toml, and locks/ against constraints.txt and pyproject.toml
python tools/audit.py --database    also checks the exact versions against PyPI's database, with pip-audit

Needs the package `packaging`. --root DIR checks another tree.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PIN = re.compile(r"([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)")
IMAGE = re.compile(r"image: (\S+?):v?(\d[\d.]*)\s*(?:#.*)?")
KNOWN_BAD = "pillow==8.0.0"  # its holes are in every database


class Holes:
    """The contents of tools/known_holes.toml."""

    def __init__(self, path: Path) -> None:
        values = tomllib.loads(path.read_text())
        self.bad = {
            hole["package"]: ([SpecifierSet(text) for text in hole["bad"]], hole["ids"]) for hole in values["hole"]
        }
        self.accepted = {(one["package"], Version(one["floor"])) for one in values.get("accepted", [])}

    def of(self, package: str, version: Version) -> str:
        """The ids of the first known holes of a release; "" if there is none."""
        ranges, ids = self.bad.get(package, ([], []))
        return ", ".join(ids[:3]) if any(bad.contains(version, prereleases=True) for bad in ranges) else ""


def pin_files(root: Path) -> list[Path]:
    """All files that pin exact versions."""
    clients = root / "tests" / "clients" / "requirements.txt"
    files = [root / "constraints.txt", root / "overrides.txt", *sorted((root / "locks").glob("*.txt"))]
    return [*files, clients] if clients.exists() else files


def pins(path: Path) -> dict[str, Version]:
    """The exact versions in a file of requirements or constraints."""
    matches = (PIN.match(line) for line in path.read_text().splitlines())
    return {canonicalize_name(match[1]): Version(match[2]) for match in matches if match}


def lowest(requirement: Requirement) -> Version:
    """The lowest version that a requirement allows; 0 if it has no floor."""
    floors = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==", "~=")]
    return max(floors, default=Version("0"))


def requirements(project: dict[str, Any]) -> dict[str, list[Requirement]]:
    """The requirements of each extra, with those of every installation; the key "" has only the latter."""
    extras = {"": [], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in project["dependencies"] + own] for extra, own in extras.items()}


def holes_found(root: Path, holes: Holes) -> Iterator[str]:
    """A sentence for each release with known holes that a file of the tree installs or allows."""
    for path in pin_files(root):
        for package, version in pins(path).items():
            if ids := holes.of(package, version):
                yield f"{path.relative_to(root)}: {package} {version} has known holes ({ids}); pin a later release"
    for path in sorted(root.glob("compose*.yaml")):
        for name, version in IMAGE.findall(path.read_text()):
            if ids := holes.of(name, Version(version)):
                yield f"{path.name}: {name} {version} has known holes ({ids}); take a later tag"
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    used = set()
    for one in {str(one): one for group in requirements(project).values() for one in group}.values():
        package, floor = canonicalize_name(one.name), lowest(one)
        if ids := holes.of(package, floor):
            used.add((package, floor))
            if (package, floor) not in holes.accepted:
                yield f"pyproject.toml: {str(one)!r} admits {package} {floor}, which has known holes ({ids}); raise it"
    for package, floor in sorted(holes.accepted - used):
        yield f"tools/known_holes.toml: no requirement needs the accepted floor {package} {floor}; remove it"


def locks_stale(root: Path) -> Iterator[str]:
    """A sentence for each lock that does not fit constraints.txt, overrides.txt or pyproject.toml."""
    pinned = pins(root / "constraints.txt") | pins(root / "overrides.txt")
    extras = requirements(tomllib.loads((root / "pyproject.toml").read_text())["project"])
    for path in sorted((root / "locks").glob("*.txt")):
        name, locked = path.relative_to(root), pins(path)
        for package, version in locked.items():
            if pinned.get(package, version) != version:
                yield f"{name}: {package} {version}, but {pinned[package]} elsewhere; run make locks"
        for one in extras.get(path.stem, []):
            present = locked.get(canonicalize_name(one.name))
            if present is None or not one.specifier.contains(present, prereleases=True):
                yield f"{name}: nothing for {str(one)!r} of pyproject.toml; run make locks"
        if "--hash=sha256:" not in path.read_text():
            yield f"{name}: it has no hashes; run make locks"


def holes_in_database(exact: list[str]) -> list[str]:
    """The findings of pip-audit for exact versions, each package once, as sentences. Raises OSError if it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(exact))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
        done = subprocess.run([*command, "--format=json", "-r", file.name], capture_output=True, text=True)
    if not done.stdout.strip():
        raise OSError((done.stderr.strip() or "it printed nothing").splitlines()[-1][:200])
    return [
        f"{one['name']} {one['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no release'}"
        for one in json.loads(done.stdout)["dependencies"]
        for hole in one.get("vulns", [])
    ]


def database(root: Path) -> list[str]:
    """The holes of all exact versions in PyPI's database. Raises OSError if it cannot be reached."""
    if not holes_in_database([KNOWN_BAD]):
        raise OSError(f"it lists no hole of {KNOWN_BAD}")
    rounds: list[dict[str, Version]] = []  # two locks may differ, and pip-audit accepts a package only once
    for path in pin_files(root):
        for package, version in pins(path).items():
            if any(one.get(package) == version for one in rounds):
                continue
            free = next((one for one in rounds if package not in one), None)
            if free is None:
                rounds.append(free := {})
            free[package] = version
    return [
        line
        for one in rounds
        for line in holes_in_database([f"{package}=={version}" for package, version in one.items()])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tools/audit.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--database", action="store_true", help="check PyPI's database too")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the tree to check")
    options = parser.parse_args()
    root = options.root
    findings = [*holes_found(root, Holes(root / "tools" / "known_holes.toml")), *locks_stale(root)]
    if options.database:
        try:
            findings += database(root)
        except OSError as error:
            print(f"audit: PyPI's database was NOT checked: {error}")
    for line in findings:
        print(f"audit: {line}", file=sys.stderr)
    if findings:
        sys.exit(1)
    print("audit: no pin and no floor has a hole listed in tools/known_holes.toml")


if __name__ == "__main__":
    main()
