"""The table of a report that says how well each layer's output is kept."""

import math
from collections.abc import Mapping, Sequence

# Of `sparsity.reconstruction.errors.Errors`, in its order.
_COLUMNS = ("before", "after", "held out before", "held out after")


def error_rows(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, str]]:
    """Return the rows of a table, the layer with the largest error after the update first.

    errors: name of a target -> name of a layer -> relative squared errors as `_COLUMNS` has them, NaN where one was not
    measured. In per cent.
    """
    names = list(dict.fromkeys(name for found in errors.values() for name in found))
    worst = {name: max((found[name][1] for found in errors.values() if name in found), default=0.0) for name in names}
    shown = [
        (label, i)
        for label, found in errors.items()
        for i in range(len(_COLUMNS))
        if any(not math.isnan(values[i]) for values in found.values())
    ]
    return [
        {"layer": name} | {f"{label}: {_COLUMNS[i]} %": _percent(errors[label].get(name, ()), i) for label, i in shown}
        for name in sorted(names, key=lambda name: -worst[name])
    ]


def _percent(values: Sequence[float], place: int) -> str:
    return f"{100 * values[place]:.3g}" if place < len(values) and not math.isnan(values[place]) else "-"
