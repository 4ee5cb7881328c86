"""Model card of a finished run: README.md beside the weights."""

from collections.abc import Mapping
from typing import Any

from engine.reports.report import markdown_table
from sparsity.masks import Masks
from sparsity.view import PrunableView

FRONT = "---\ntags:\n- {tag}\n---\n"
LOADING = """```python
from safetensors.torch import load_file

weights = load_file("model.safetensors")  # dense shapes{zeros}
```
"""


def model_card(
    title: str,
    facts: Mapping[str, Any],
    masks: Masks | None,
    view: PrunableView,
    metrics: Mapping[str, Mapping[str, float]],
    command: str,
) -> str:
    """Markdown: how the weights were made, what is left of them, what they are worth.

    facts: lines of the list at the top. masks: None for a dense model. metrics: name of a test -> metric -> value.
    """
    pruner = facts_of(masks)
    parts = [FRONT.format(tag="sparse" if masks else "dense"), f"# {title}\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in (dict(facts) | pruner).items()))
    parts.append(LOADING.format(zeros=", pruned weights are zero; mask.safetensors says which" if masks else ""))
    if masks:
        report = masks.report(view)
        counts = report.groups | {"all": report.overall}
        rows = [
            {"weights": n, "kept": c.kept, "of": c.total, "sparsity %": 100 * c.sparsity} for n, c in counts.items()
        ]
        parts += ["## Sparsity\n", markdown_table(rows) + "\n", *(f"Warning: {line}\n" for line in report.warnings)]
    for name, values in metrics.items():
        parts += [
            f"## Metrics: {name}\n",
            markdown_table([{"metric": k, "value": v} for k, v in values.items()]) + "\n",
        ]
    parts += ["## Command\n", f"```\n{command}\n```\n"]
    return "\n".join(parts)


def facts_of(masks: Masks | None) -> dict[str, Any]:
    """Return what the mask file says of how the mask was chosen."""
    if masks is None:
        return {"pruner": "none, the model is dense"}
    known = {"pruner": "not recorded in the mask file"} | masks.provenance
    told = ("pruner", "preset", "sparsity", "pattern", "pool")
    return {key: known[key] for key in told if known.get(key) is not None}
