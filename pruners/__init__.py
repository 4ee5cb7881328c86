"""Scores, the importance of each weight: one file per method, whose name is its name on the command line.

`available()` lists them and imports none; `build(name)` imports that one alone. `prune` is all of it in one call.
`presets()` lists the names that stand for a pruner with options, which `build` and `prune` take in its place.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pruners.presets import PRESETS, record, resolve
from sparsity.errors import UserError
from sparsity.pattern import NM, Block, pattern_of
from sparsity.run.axes import AXES, BOUNDS
from sparsity.run.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from pruners.base import Pruner
    from sparsity.allocation.budget import Sparsity
    from sparsity.masks import Masks
    from sparsity.run.engine import Engine
    from sparsity.view import PrunableView

_PRUNERS = Registry("pruner", "pruners", "pruners.base:Pruner", ("base", "presets"))


def available() -> list[str]:
    """Return the names of the pruners: the files of this folder except their base and the presets."""
    return _PRUNERS.names()


def presets() -> dict[str, str]:
    """Return the presets: name -> what it means, in one line."""
    return {name: preset.means for name, preset in PRESETS.items()}


def listed() -> str:
    """Return all names, as --help shows them: the pruners, and apart from them the presets with what they mean."""
    told = "; ".join(f"{name} ({means})" for name, means in presets().items())
    return f"{', '.join(available())}; or a preset: {told}"


def check(name: str) -> None:
    """Raise UserError, with the nearest name, unless there is a pruner or a preset of this name."""
    _PRUNERS.check(name, PRESETS)


def build(
    pruner: "str | type[Pruner]",
    *,
    enable_update: bool = False,
    pattern: "NM | Block | None" = None,
    sparsities: "Sequence[Sparsity]" = (),
    **options: Any,
) -> "Engine":
    """Return what runs a pruner: its plan, with the options that are given in place of its own.

    pruner: a name, a preset's, or a class. options: of the score, of the reconstruction, and those of every plan (see
    `sparsity.run.plan.make_plan`); None: not given. enable_update: as reconstruct, for a pruner that has an update of
    its own. pattern, sparsities: what is wanted, by which a preset chooses. Raises UserError for an unknown name (with
    the nearest one), for an option that the plan does not read, and for what cannot be combined.
    """
    if isinstance(pruner, str) and pruner in PRESETS:
        choice, given = resolve(pruner, pattern, sparsities), {o: v for o, v in options.items() if v is not None}
        built = build(choice.pruner, enable_update=enable_update, **(dict(choice.options) | given))
        return type(built)(replace(built.plan, preset=record(pruner, choice, given)))
    if isinstance(pruner, str):
        check(pruner)
    plans, engine = importlib.import_module("sparsity.run.plan"), importlib.import_module("sparsity.run.engine")
    kind = _PRUNERS.find(pruner) if isinstance(pruner, str) else pruner
    given = {option: value for option, value in options.items() if value is not None}
    if enable_update:
        if not updates(kind):
            own = ", ".join(name for name in available() if updates(name))
            raise UserError(f"--enable_update is for {own}: leave it out, or give --reconstruct")
        given = {"reconstruct": kind.solver} | given
    own = _parameters(kind)
    score = kind(**{option: value for option, value in given.items() if option in own})
    return engine.Engine(plans.make_plan(score, **{o: v for o, v in given.items() if o not in own}))


def updates(pruner: "str | type[Pruner]") -> bool:
    """Return whether a pruner has an update of the kept weights that it is published with and without."""
    if isinstance(pruner, str) and pruner in PRESETS:
        return False
    kind = _PRUNERS.find(pruner) if isinstance(pruner, str) else pruner
    return kind.solver is not None and kind.solver != kind.reconstruction


def own_options(
    name: str, given: Mapping[str, Any], pattern: "NM | Block | None" = None, sparsities: "Sequence[Sparsity]" = ()
) -> dict[str, Any]:
    """Return those of the given options which a pruner reads that is otherwise as it is published; steps are for those
    that are published with several. pattern, sparsities: as of `build`.
    """
    plan = build(name, reconstruct=given.get("reconstruct"), pattern=pattern, sparsities=sparsities).plan
    known = {
        *AXES,
        *_parameters(type(plan.score)),
        *(_parameters(type(plan.reconstruction)) if plan.reconstruction else ()),
    }
    known |= {"enable_update"} if updates(name) else set()
    known -= set() if plan.of_inputs else {"calibration_mode", "offload"}
    known -= set() if plan.score.in_steps else {"epochs", "schedule"}
    known -= {"pool", "allocation", "scope", "swaps", *BOUNDS} if plan.whole else set()
    solver = plan.reconstruction if plan.reconstruction and not plan.whole else None
    known -= set() if solver else {"target", "correct_bias", "layer_errors"}
    known -= set() if solver and "dense" in solver.targets else {"target"}
    by_blocks = plan.of_inputs and given.get("calibration_mode", plan.calibration) == "sequential"
    known -= set() if by_blocks else {"block_steps", "block_window", "calibrate_within"}
    return {option: value for option, value in given.items() if option in known}


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def one_shot(name: str) -> bool:
    """Return whether a pruner, as it is published, needs one step and one pass over the data, or none."""
    engine = build(name)
    return engine.plan.one_pass and not engine.plan.score.in_steps


def prune(
    model: "nn.Module | PrunableView",
    pruner: str = "wanda",
    *,
    sparsity: "Sparsity | list[Sparsity] | tuple[Sparsity, ...] | None" = None,
    pattern: "str | NM | Block | None" = None,
    group_sparsity: "Mapping[str, Sparsity] | None" = None,
    data: "Iterable[Any] | None" = None,
    start: "Masks | None" = None,
    seed: int = 42,
    **options: Any,
) -> "Masks | list[Masks]":
    """Prune a model by a plan, and return the masks, with updated weights where the plan reconstructs.

        masks = pruners.prune(model, "wanda", pattern="2:4", reconstruct="sparsegpt", data=batches)
        masks.save("masks.safetensors")
        masks.apply(sparsity.PrunableView(model, ...))

    model: a view of it, or any module, of which every linear layer is pruned and each batch is its arguments (a dict, a
    tuple, or the one argument). sparsity: a fraction, or several, for which a list is returned. pattern: N:M instead,
    or "block4x4" beside it. start: masks that are there already, whose zeros stay and count. options: as `build`. The
    model itself is not changed. Raises UserError for what cannot be.
    """
    views = importlib.import_module("sparsity.run.generic")
    wanted = sparsity if isinstance(sparsity, list | tuple) else [] if sparsity is None else [sparsity]
    chosen = pattern_of(pattern) if pattern is None or isinstance(pattern, str) else pattern
    built = build(pruner, pattern=chosen, sparsities=wanted, **options)
    view = views.generic_view(model)
    asked = {"pattern": chosen, "seed": seed, "groups": group_sparsity, "start": start}
    found = [masks for _, masks in built.prune(view, data, wanted, **asked)]
    return found if isinstance(sparsity, list | tuple) else found[0]
