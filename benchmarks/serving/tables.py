"""Results as Markdown, and the section of a document that holds them."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.serving.load import Summary

PACKAGES = ("onnxruntime", "torch", "diffusers", "litserve", "fastapi", "uvicorn", "uvloop", "aiohttp", "numpy")


@dataclass
class Result:
    """The measurements of a contestant. Rates in images/s, times in seconds.

    offline: saturated throughput. single: latency of one request alone. loads: fraction of the reference capacity ->
    summary, up to the first fraction that was not sustained. highest: the highest sustained load.
    """

    label: str
    offline: float
    single: float | None = None
    loads: dict[float, Summary] = field(default_factory=dict)
    highest: float | None = None


def describe_machine() -> str:
    processor = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        processor = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), processor)
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}; load average at the start {load}"


def describe_versions() -> str:
    versions = [f"CPython {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def milliseconds(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return ""
    return "∞" if math.isinf(seconds) else f"{1000 * seconds:.0f}"


def per_second(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}"


def offline_table(results: Sequence[Result], tried: Sequence[tuple[str, float]]) -> list[str]:
    rows = [[r.label, per_second(r.offline), milliseconds(r.single)] for r in results]
    rows += [[label, per_second(rate), ""] for label, rate in tried]
    return table(["", "images/s, saturated", "one request of 25 steps alone, ms"], rows)


def load_table(fraction: float, capacity: float, results: Sequence[Result]) -> list[str]:
    rows = []
    for r in results:
        if (s := r.loads.get(fraction)) is None:
            rows.append([r.label, *["not run: a lower load was not sustained"], *[""] * 8])
            continue
        times = (s.p50, s.p95, s.p99, s.short_p50, s.short_p95, s.short_p99)
        kept = "yes" if s.sustained else "no"
        rows.append([r.label, per_second(s.throughput), *map(milliseconds, times), f"{s.lost} of {s.offered}", kept])
    head = ["", "images/s", "p50", "p95", "p99", "10 steps: p50", "p95", "p99", "lost", "sustained"]
    title = f"**{fraction:.0%} load: {fraction * capacity:.1f} requests/s**, latencies in ms"
    return [title, "", *table(head, rows)]


def sustained_table(capacity: float, results: Sequence[Result]) -> list[str]:
    def shown(rate: float | None) -> list[str]:
        if rate is None:
            return ["not measured", ""]
        return [per_second(rate), f"{rate / capacity:.0%}"] if rate else [f"below {0.05 * capacity:.1f}", "below 5%"]

    rows = [[r.label, *shown(r.highest)] for r in results]
    return table(["", "highest sustained load, requests/s", "of the reference capacity"], rows)


def comparison(results: Sequence[Result]) -> list[str]:
    """A sentence for each other contestant: ours, the first, relative to it."""
    ours, lines = results[0], []
    for peer in results[1:]:
        facts = [f"throughput {ratio(ours.offline, peer.offline)}"]
        if ours.highest is not None and peer.highest:
            facts.append(f"highest sustained load {ratio(ours.highest, peer.highest)}")
        for fraction, summary in peer.loads.items():
            if fraction in ours.loads:
                mine = ours.loads[fraction]
                facts.append(
                    f"p95 at {fraction:.0%} load {ratio(summary.p95, mine.p95)} shorter, "
                    f"of 10 steps {ratio(summary.short_p95, mine.short_p95)}"
                )
        lines.append(f"- Ours against {peer.label}: {'; '.join(facts)}.")
    return lines


def ratio(a: float, b: float) -> str:
    if math.isinf(a) and math.isinf(b):
        return "(neither)"
    return f"{a / b:.2f} times" if b and not math.isinf(a) else "∞ times"


def section(about: Mapping[str, str], capacity: float, results: Sequence[Result], tried: Sequence[tuple[str, float]],
            reference: Mapping[str, Any] | None) -> str:  # fmt: skip
    """The report of one run in Markdown. results: ours first. tried: rates of configurations that were dropped."""
    lines = [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", *offline_table(results, tried), ""]
    if reference:
        lines += [
            f"diffusers, offline: {reference['rate']:.1f} images/s in batches of {reference['batch_size']} (the "
            f"better of two sizes), {1000 * reference['p50']:.0f} ms for one image of 25 steps; its transformer has "
            f"{reference['parameters'] / 1e6:.1f}M parameters.",
            "",
        ]
    with_load = [r for r in results if r.loads]
    for fraction in sorted({f for r in with_load for f in r.loads}):
        lines += [*load_table(fraction, capacity, with_load), ""]
    if with_load:
        lines += [*sustained_table(capacity, with_load), ""]
    return "\n".join(lines + comparison(results))


def replace_section(path: Path, name: str, body: str) -> None:
    """Put `body` between the marker comments `name` of a document, or at its end if it has none."""
    begin, end = f"<!-- serving:{name} -->", f"<!-- /serving:{name} -->"
    text = path.read_text() if path.exists() else ""
    if begin in text and end in text:
        before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
    else:
        before, after = text + ("\n" if text else ""), "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{body.strip()}\n{end}{after}")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def cpu_seconds(pid: int | str) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
