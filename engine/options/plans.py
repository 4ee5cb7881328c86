"""A YAML file of named plans, as compare.py reads it; needs no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loading import read_yaml
from engine.options.allocation import resolved
from engine.options.command_line import PLAN
from sparsity.allocation.budget import Sparsity, parse_sparsities
from sparsity.errors import UserError
from sparsity.pattern import NM, Block, pattern_of


@dataclass(frozen=True)
class PlanFile:
    """One plan. pruner: its name. options: of `PLAN`. pattern, groups: of `sparsity.run.request.Request`."""

    pruner: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: NM | Block | None = None
    groups: Mapping[str, Sparsity] = field(default_factory=dict)

    def build(self, name: str, build: Callable[..., Any]) -> Any:
        """Return what `build(pruner, pattern=..., **options)` makes. UserError that names the plan."""
        try:
            return build(self.pruner, pattern=self.pattern, **self.options)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name != self.pruner else str(error)) from None


def plans_of(
    file: Path | None,
    names: Sequence[str] | None,
    usual: Callable[[], Iterable[str]],
    options: Mapping[str, Any],
    pattern: str | None,
    own: Callable[..., dict[str, Any]],
) -> dict[str, PlanFile]:
    """Return name -> plan: of a file, all or those of these names; or one for each pruner of these names, or of the
    usual ones (asked for where they are needed: that loads torch), with this pattern and the options that it reads.

    own: of a pruner's name, options and pattern, the options that it reads. UserError where a file and options are
    given, for a name that is not in the file, and for an option that no pruner reads.
    """
    given = [*options, *(["pattern"] if pattern else [])]
    if file and given:
        raise UserError(f"--plans {file} says patterns and options: leave {', '.join(given)} out")
    if file:
        plans = read_plans(file)
        if unknown := [name for name in names or () if name not in plans]:
            raise UserError(f"{file}: there is no plan {unknown[0]!r}; there are: {', '.join(plans)}")
        return {name: plans[name] for name in names or plans}
    kept = pattern_of(pattern)
    read = {name: own(name, options, pattern=kept) for name in names or usual()}
    for option in options:
        if not any(option in each for each in read.values()):
            raise UserError(f"--{option}: none of {', '.join(read)} reads it: leave it out")
    return {name: PlanFile(name, each, kept) for name, each in read.items()}


def read_plans(path: Path) -> dict[str, PlanFile]:
    """Return the plans of a file, name -> plan: {pruner: NAME, and any of pattern, group_sparsity and the options of
    prune.py}. UserError that names file, plan and key.
    """
    content = read_yaml(path)
    if not content:
        raise UserError(f"{path}: expected plans, name: {{pruner: NAME, ...}}")
    return {str(name): _plan(f"{path}: {name}", entry) for name, entry in content.items()}


def _plan(where: str, entry: Any) -> PlanFile:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("pruner"), str):
        raise UserError(f"{where}: expected a mapping with the key pruner")
    options = {key: value for key, value in entry.items() if key not in ("pruner", "pattern", "group_sparsity")}
    for key in options:
        if key not in PLAN:
            raise UserError(
                f"{where}: unknown key {key!r}; there are: pruner, pattern, group_sparsity, {', '.join(PLAN)}"
            )
    shares = entry.get("group_sparsity", {})
    if not isinstance(shares, Mapping):
        raise UserError(f"{where}: group_sparsity: expected group: sparsity, got {shares!r:.60}")
    try:
        pattern = entry.get("pattern")
        if isinstance(pattern, int):  # YAML reads 2:4 as a number to the base of 60
            raise UserError(f"pattern: write it in quotes, '2:4', got {pattern}")
        options |= {"allocation": resolved(options["allocation"])} if "allocation" in options else {}
        groups = {str(group): parse_sparsities(str(share))[0] for group, share in shares.items()}
        return PlanFile(entry["pruner"], options, pattern_of(pattern), groups)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
