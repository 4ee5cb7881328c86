"""Columns and levels of tables of results: how axes and headings name them, and what a reader has to know of them."""

import re
from collections.abc import Iterable

_MODALITY = "share of its prunable weights that are zero, in per cent"
# What a column measures, by the beginning of its name: its name in a legend, and its meaning.
_MEANINGS = (
    (r"i2t R@", "i2t R@k", "image-to-text recall: for how many of 100 images one of the first k captions is right"),
    (r"t2i R@", "t2i R@k", "text-to-image recall: for how many of 100 captions the right image is among the first k"),
    (r"top-", "top-k", "accuracy: for how many of 100 images the right class is among the first k"),
    (r"cos ", "cos %", "cosine between the features of the pruned and of the dense model; 100: the same"),
    (r"pooled", "pooled %", "the same of the pooled output, which the head reads"),
    (r"agree", "agree %", "how often the first prediction is the dense model's"),
    (r"KL ", "KL mnat", "divergence of the predictions from the dense model's, in thousandths of a nat; 0: the same"),
    (r"perplexity", "perplexity", "of the words that are predicted; lower is better"),
    (r"Frechet", "Frechet", "distance between the features of drawn and of real images; lower is better"),
    (r"as asked", "as asked %", "how often the class that was asked for is recognised in the drawn image"),
    (r"eval s", "eval s", "seconds of the evaluation"),
)
_IN_PERCENT = ("i2t R@", "t2i R@", "top-")  # though their names do not say so
_LOWER = ("KL ", "perplexity", "Frechet", "eval s")  # is better


def level_name(label: str) -> str:
    """Return the label of a set of masks with its unit: "75" is "75 %", "75 recovered" is "75 % recovered", and
    patterns, such as "2:4", and "dense" are as they are.
    """
    level, _, rest = label.partition(" ")
    return f"{level} % {rest}".rstrip() if re.fullmatch(r"[\d.]+(e-\d+)?", level) else label


def axis_name(measure: str) -> str:
    """Return the name of a column with its unit, as an axis has it."""
    if measure.startswith(_IN_PERCENT):
        return f"{measure} (%)"
    return f"{measure} (lower is better)" if lower_is_better(measure) else measure


def lower_is_better(measure: str) -> bool:
    """Return whether a model is the better, the lower this column is."""
    return measure.startswith(_LOWER)


def meanings(measures: Iterable[str], modalities: Iterable[str]) -> dict[str, str]:
    """Return name -> meaning of what stands in a table of results: the columns that measure quality, each family once,
    and those of the modalities' sparsity.
    """
    measures = list(measures)
    known = {name: what for start, name, what in _MEANINGS if any(re.match(start, column) for column in measures)}
    return {
        "sparsity": "what was asked for, in per cent; a pattern N:M keeps N of every M weights in a row",
        ", ".join(f"{name} %" for name in modalities): _MODALITY + " (all: of the whole model)",
        **known,
        "seconds": "to choose the masks, and to update the kept weights; calibration, once for a run, is apart",
    }
