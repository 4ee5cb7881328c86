"""The report of a benchmark: a table in Markdown and CSV, a picture, and what the numbers do not say."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.deployment.measure import GPUS, Variant, quartiles, roofline
from engine.reports.report import markdown_table
from sparsity.files import replacing, write_atomic

NOISE = "within the noise"
MEASURED = """Medians and quartiles of rounds in which all variants take turns. Multiply-adds: of linear layers and
convolutions, for one sample, without those by zeros. A packed file is unpacked when it is loaded, and runs as the
masked model does; layers are accelerated when it is loaded, from any of the files.
"""
ESTIMATE = """## GPUs by their data sheets: an estimate, nothing of it is measured

The least time in 16 bits is max(2 F B / P, W b / M), with F multiply-adds a sample, batch B, P FLOP/s, W weights of b
bytes, M bytes/s; 2:4 halves F, and b is 9/16 of 2 bytes. Real kernels are slower, those of 2:4 by more.
"""


def rows_of(variants: Sequence[Variant], batches: Sequence[int]) -> list[dict[str, str]]:
    """Return a row for each variant and batch size. The first variant is what the others are compared with; a ratio is
    given where the quartiles of both do not overlap.
    """
    first, rows = variants[0], []
    for variant in variants:
        for batch in batches:
            row = {"variant": variant.name, "batch": str(batch), "MB on disk": f"{variant.bytes / 1e6:.2f}"}
            row |= {"M weights": f"{variant.parameters / 1e6:.2f}" if variant.parameters else "-"}
            row |= {"G multiply-adds": f"{variant.operations / 1e9:.3f}" if variant.operations else "-"}
            times = variant.seconds.get(batch)
            row |= _times(times, first.seconds.get(batch), batch) if times else dict.fromkeys(_TIMES, "as masked")
            memory = variant.memory.get(batch)
            row["MB a pass"] = f"{memory / 1e6:.0f}" if memory else "-"
            rows.append(row | {name: f"{value:.2f}" for name, value in variant.quality.items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "-") for name in columns} for row in rows]


_TIMES = ("ms", "quartiles", "samples/s", "times as fast")


def _times(own: Sequence[float], dense: Sequence[float] | None, batch: int) -> dict[str, str]:
    low, median, high = quartiles(own)
    values = [f"{1000 * median:.2f}", f"{1000 * low:.2f} to {1000 * high:.2f}", f"{batch / median:.1f}"]
    if dense is None:
        return dict(zip(_TIMES, [*values, "-"], strict=True))
    least, usual, most = quartiles(dense)
    clear = own is dense or high < least or most < low
    return dict(zip(_TIMES, [*values, f"{usual / median:.2f}" if clear else NOISE], strict=True))


def roofline_rows(variants: Sequence[Variant], batches: Sequence[int]) -> list[dict[str, str]]:
    """Return what GPUs by their data sheets could reach at best, dense and with 2:4."""
    dense, rows = variants[0], []
    for name, gpu in GPUS.items():
        for batch in batches:
            times = [
                1000 * roofline(gpu, dense.operations, dense.parameters, batch, semi_structured=semi)
                for semi in (False, True)
            ]
            row = {"GPU": name, "batch": str(batch), "dense ms": f"{times[0]:.3f}", "2:4 ms": f"{times[1]:.3f}"}
            rows.append(row | {"at most": f"{times[0] / times[1]:.2f}"})
    return rows


def write_speed(
    folder: Path, title: str, facts: Mapping[str, Any], variants: Sequence[Variant], batches: Sequence[int], table: str
) -> str:
    """Write speed.md, speed.csv and speed.png; return the table. table: what was chosen for each layer."""
    rows = rows_of(variants, batches)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "speed.csv", text.getvalue().encode())
    _plot(folder / "speed.png", title, variants, batches)
    listed = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    found = markdown_table(rows)
    parts = [f"# {title}\n", listed, f"{found}\n", "![samples per second](speed.png)\n"]
    parts += [MEASURED]
    if table:
        parts += ["## What each layer is computed by\n", f"{table}\n"]
    parts += [ESTIMATE]
    parts += [markdown_table(roofline_rows(variants, batches)) + "\n"]
    write_atomic(folder / "speed.md", "\n".join(parts).encode())
    return found


def _plot(path: Path, title: str, variants: Sequence[Variant], batches: Sequence[int]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [variant for variant in variants if variant.seconds]
    figure = Figure(figsize=(2.5 + 3 * len(batches), 1.5 + 0.4 * len(timed)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        spread = [quartiles(variant.seconds[batch]) for variant in timed]
        rates = [batch / median for _, median, _ in spread]
        lower = [batch / median - batch / high for _, median, high in spread]
        upper = [batch / low - batch / median for low, median, _ in spread]
        axis.barh([variant.name for variant in timed], rates, xerr=[lower, upper], capsize=3)
        axis.invert_yaxis()
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("samples per second (median, quartiles)")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
