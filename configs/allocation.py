"""Files of allocations: how much each layer or modality loses, as prune.py writes them and --allocation reads them.

vision: 0.6                             # a group, or a glob over names of layers: the first rule that matches holds
"text.*.mlp.*": 80                      # a fraction below 1, or per cent from 1 on
text.blocks.0.attn.q.weight: 1843/4096  # of so many weights, exactly; what no rule names fills the budget
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from configs.loading import read_yaml
from sparsity.errors import UserError
from sparsity.files import write_atomic

ENDINGS = (".yaml", ".yml")  # of such a file's name


def read_allocation(path: str | Path) -> dict[str, str | int | float]:
    """Return the rules of a file, glob or group -> sparsity. UserError, one line that names file and rule."""
    rules: dict[str, str | int | float] = {}
    for rule, value in read_yaml(path).items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{path}: {rule}: expected a sparsity such as 0.7, 70 or 1843/4096, got {value!r:.60}")
        rules[str(rule)] = value
    if not rules:
        raise UserError(f"{path}: expected rules, layer or group: sparsity")
    return rules


def save_allocation(path: Path, rules: Mapping[str, str], title: str) -> None:
    """Write rules, name of a weight -> "pruned/total", with per cents beside them, whole or not at all."""
    lines = [f"# {title}", "# The first rule that matches a layer holds: a glob over names, or a group."]
    for rule, value in rules.items():
        pruned, _, total = value.partition("/")
        entry = yaml.safe_dump({rule: value}, default_flow_style=False, width=10_000, allow_unicode=True).strip()
        lines.append(f"{entry}  # {100 * int(pruned) / int(total):.2f} %")
    write_atomic(path, ("\n".join(lines) + "\n").encode())
