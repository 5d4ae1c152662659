"""A ParityReport as text, JSON, a self-contained HTML page, and a PNG (with matplotlib)."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import LockstepError
from .parity import LayoutResult, ParityReport


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(t) for t in titles]] + [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    return "\n".join("  " + "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def as_text(report: ParityReport) -> str:
    lines = [
        f"worker: profile {report.profile}, weights {report.weight_version}; temperature {report.temperature:g}",
        _table(
            ["metric", *(layout.layout for layout in report.layouts)],
            [[name, *(layout.metrics[name] for layout in report.layouts)] for name in report.layouts[0].metrics],
        ),
    ]
    for layout in report.layouts:
        lines += [f"{layout.layout}, by position:", _table(("positions", "tokens", "mean", "max"), layout.by_position)]
        lines += [f"{layout.layout}, by type of token:", _table(("type", "tokens", "mean", "max"), layout.by_type)]
        if layout.worst:
            lines.append(f"{layout.layout}, worst tokens:")
            lines.append(
                _table(
                    ("sequence", "position", "token", "rollout", "trainer", "after"),
                    [(w.sequence, w.position, w.token, w.rollout, w.trainer, repr(w.context)) for w in layout.worst],
                )
            )
    if report.left_out:
        lines.append(f"left out: {report.left_out} samples that a weight update fell into")
    lines += [f"FOUND: {finding}" for finding in report.findings]
    lines += [f"BROKEN: {layout.layout}: {text}" for layout in report.layouts for text in layout.broken]
    lines.append("passed" if report.passed else "failed")
    return "\n".join(lines)


def as_json(report: ParityReport) -> dict[str, Any]:
    def layout(result: LayoutResult) -> dict[str, Any]:
        fields = {
            f.name: getattr(result, f.name)
            for f in dataclasses.fields(result)
            if f.name not in ("differences", "positions", "worst")
        }
        return fields | {"worst": [dataclasses.asdict(w) for w in result.worst]}

    fields = ("profile", "weight_version", "temperature", "findings", "left_out", "passed")
    return {name: getattr(report, name) for name in fields} | {"layouts": [layout(r) for r in report.layouts]}


def histogram(differences: np.ndarray) -> list[tuple[str, int]]:
    """Counts by decade of |difference|."""
    finite = np.isfinite(differences) & (differences > 0)
    decades = np.clip(np.floor(np.log10(differences[finite])).astype(int), -8, 1)
    rows = [("0", int((differences == 0).sum()))]
    rows += [(f"1e{d} to 1e{d + 1}", int((decades == d).sum())) for d in range(-8, 2)]
    return rows + [("not finite", int((~np.isfinite(differences)).sum()))]


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(t)}</th>" for t in titles)
    body = "".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max([count for _, count in rows] + [1])
    return "".join(
        f'<div class="row"><span>{html.escape(name)}</span><i style="width:{400 * count / most:.0f}px"></i>{count}</div>'
        for name, count in rows
    )


def _position_svg(result: LayoutResult, width: int = 800, height: int = 220) -> str:
    """Mean and largest |difference| over position, on a logarithmic axis from 1e-8 to 10."""
    buckets = np.minimum(result.positions * 100 // max(1, int(result.positions.max()) + 1), 99)
    points: dict[str, list[str]] = {"mean": [], "max": []}
    for bucket in range(100):
        chosen = result.differences[buckets == bucket]
        if not chosen.size:
            continue
        for name, value in (("mean", chosen.mean()), ("max", chosen.max())):
            y = height * (1 - (np.log10(np.clip(value, 1e-8, 10)) + 8) / 9)
            points[name].append(f"{width * (bucket + 0.5) / 100:.1f},{y:.1f}")
    lines = "".join(f'<polyline class="{name}" points="{" ".join(p)}"/>' for name, p in points.items())
    grid = "".join(
        f'<line x1="0" x2="{width}" y1="{height * i / 9:.1f}" y2="{height * i / 9:.1f}"/><text x="2" y="{height * i / 9 - 2:.1f}">1e{1 - i}</text>'
        for i in range(1, 9)
    )
    return f'<svg width="{width}" height="{height}" role="img">{grid}{lines}</svg>'


_STYLE = """body{font:14px sans-serif;max-width:60em;margin:2em auto}table{border-collapse:collapse;margin:1em 0}
td,th{padding:2px 10px;border-bottom:1px solid #ddd;text-align:right}.row span{display:inline-block;width:9em;text-align:right;margin-right:8px}
.row i{display:inline-block;height:11px;background:#47a;margin-right:6px}svg line{stroke:#eee}svg text{font-size:10px;fill:#888}
polyline{fill:none;stroke:#47a;stroke-width:1.5}.max{stroke:#c55}.bad{color:#b00}"""


def as_html(report: ParityReport) -> str:
    """One page without outside references."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Lockstep parity</title><style>{_STYLE}</style><h1>Parity: {'passed' if report.passed else 'failed'}</h1>"
    ]
    parts.append(
        f"<p>profile {html.escape(report.profile)}, weights {report.weight_version}, temperature {report.temperature:g}; {report.left_out} samples left out</p>"
    )
    parts += [f'<p class="bad">{html.escape(f)}</p>' for f in report.findings]
    for result in report.layouts:
        parts.append(f"<h2>{result.layout}</h2>")
        parts += [f'<p class="bad">{html.escape(text)}</p>' for text in result.broken]
        parts.append(_html_table(("metric", "value"), list(result.metrics.items())))
        parts.append(f"<h3>|trainer - rollout|, tokens by size</h3>{_bars(histogram(result.differences))}")
        parts.append(f"<h3>by position (blue: mean, red: largest)</h3>{_position_svg(result)}")
        parts.append(_html_table(("positions", "tokens", "mean", "max"), result.by_position))
        parts.append(_html_table(("type", "tokens", "mean", "max"), result.by_type))
        rows = [(w.sequence, w.position, w.token, w.rollout, w.trainer, w.context) for w in result.worst]
        parts.append(
            "<h3>worst tokens</h3>"
            + _html_table(("sequence", "position", "token", "rollout", "trainer", "after"), rows)
        )
    return "\n".join(parts)


def write_png(report: ParityReport, path: str | pathlib.Path) -> None:
    """Histogram and position plot. Raises LockstepError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise LockstepError("a PNG needs matplotlib: pip install matplotlib (the HTML report does not)") from None
    figure, axes = plt.subplots(len(report.layouts), 2, figsize=(12, 4 * len(report.layouts)), squeeze=False)
    for (left, right), result in zip(axes, report.layouts, strict=True):
        rows = histogram(result.differences)
        left.bar(range(len(rows)), [count for _, count in rows])
        left.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=60, fontsize=7)
        left.set_title(f"{result.layout}: |trainer - rollout|, tokens")
        right.scatter(result.positions, np.clip(result.differences, 1e-9, None), s=3)
        right.set_yscale("log")
        right.set_xlabel("position")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
