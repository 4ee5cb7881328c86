"""N:M methods on the bundled classifier beside each other, with the published figures of the same methods."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.reports.report import markdown_table, mean_and_error, with_error
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

# Folder of the results -> what it is, its mask prior, and top-1 of ViT-B/16 (augreg_in1k) on ImageNet-1k at 2:4, as the
# public code reports it (MaskLLM-4V).
METHODS: dict[str, tuple[str, str, float]] = {
    "dense": ("dense", "", 79.15),
    "magnitude": ("magnitude", "", 65.92),
    "wanda": ("Wanda", "", 63.28),
    "sparsegpt_updated": ("SparseGPT with update", "", 71.52),
    "sparsegpt": ("SparseGPT without update", "", 59.72),
    "maskllm_short_sparsegpt": ("MaskLLM, short", "SparseGPT", 76.23),
    "maskllm_short_magnitude": ("MaskLLM, short", "magnitude", 76.18),
    "maskllm_long_sparsegpt": ("MaskLLM, long", "SparseGPT", 79.46),
    "maskllm_long_magnitude": ("MaskLLM, long", "magnitude", 79.28),
}


def read_results(folder: Path) -> dict[str, dict[int, float]]:
    """Top-1 of what is finished in <folder>/<method>/<seed>.json, as timm_validate.py or maskllm_train.py writes it:
    method -> seed -> per cent.

    Raises FileNotFoundError where nothing is, UserError naming a file that is none of these.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("*/*.json")):
        method, seed = path.parent.name, path.stem
        if method not in METHODS or not seed.isdecimal():
            raise UserError(f"{path}: expected <method>/<seed>.json with a method of {', '.join(METHODS)}")
        try:
            content = json.loads(path.read_bytes())
            value = float(content.get("test", content)["top1"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not the accuracy of a model; delete it, and measure again") from error
        found.setdefault(method, {})[int(seed)] = value
    if not found:
        raise MissingFileError(f"{folder}/<method>/<seed>.json: there is none; scripts/nm_table.sh makes them")
    return found


def table(found: Mapping[str, Mapping[int, float]]) -> str:
    """Markdown: a row for each method that there is a result of."""
    rows: list[dict[str, Any]] = []
    for method, (name, prior, published) in METHODS.items():
        values = list(found.get(method, {}).values())
        if values:
            row = {"method": name, "mask prior": prior or "-", "seeds": str(len(values))}
            top1 = with_error(*mean_and_error(values), digits=2)
            rows.append(row | {"top-1": top1, "ViT-B/16, ImageNet (published)": f"{published:.2f}"})
    return markdown_table(rows)


def write_table(folder: Path) -> tuple[Path, str]:
    """`table` of the results in `folder`, written to `folder`/table.md; returns the path and the table."""
    text, path = table(read_results(folder)), folder / "table.md"
    what = (
        "Top-1 in per cent of vit_mini at 2:4 on 5,004 images of the vendor's font that training never shows: mean and"
        " standard error over seeds (what draws nothing is run once)."
    )
    write_atomic(path, f"# N:M sparsity\n\n{what}\n\n{text}\n".encode())
    return path, text
