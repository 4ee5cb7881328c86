"""The facts of a run as JSON, for a page of several: its table, and what the first captions find under each mask."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from engine.evaluation.retrieval import ZeroShot
from engine.reports.report import FACTS
from sparsity.files import write_atomic

SIDE = 128  # of a picture, in pixels, at most


def write_facts(
    folder: Path,
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    measures: Sequence[str],
    evaluate: Any,
) -> None:
    """Write `folder`/report.json.

    title, facts, rows: of the report. measures: columns of its table. evaluate: what has measured the rows.
    """
    found = _retrieved(evaluate, [row["sparsity"] for row in rows])
    told = {"title": title, "facts": facts, "rows": rows, "measures": measures, "retrieved": found}
    write_atomic(folder / FACTS, json.dumps(told).encode())


def _retrieved(evaluate: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Return captions, the number of the right picture of each, label -> numbers of the pictures that are found first,
    and number -> picture as a data URI; nothing where the evaluation is not retrieval.

    labels: of the evaluations, in their order.
    """
    if not isinstance(evaluate, ZeroShot) or not evaluate.found:
        return {}
    found = dict(zip(labels, evaluate.found, strict=True))
    captions = evaluate.captions[: len(evaluate.found[0])]
    right = evaluate.txt2img[: len(captions)]
    wanted = sorted({*right, *(number for numbers in evaluate.found for number in numbers)})
    pictures = {str(number): uri for number in wanted if (uri := _picture(evaluate, number))}
    return {"captions": captions, "right": right, "found": found, "pictures": pictures}


def _picture(evaluate: ZeroShot, number: int) -> str:
    """A picture as a data URI; empty where it cannot be read."""
    pixels = evaluate.picture(number)
    if pixels is None:
        return ""
    image, content = Image.fromarray(pixels.numpy()), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
