"""Masks are data: name of a prunable weight -> bool tensor, True where the weight is kept, in the parameter's own
layout.

The file that `save` writes is a safetensors file, the same to the byte for the same masks and provenance:
- one tensor per prunable weight, under its state-dict key ("....weight"): uint8, one bit per weight. The mask is
  flattened row-major in the parameter's own shape; weight i is bit i % 8 (least significant first) of byte i // 8, 1 =
  kept; the padding bits of the last byte are 0.
- one metadata entry, "sparsity", JSON with sorted keys:
  "format" (1); "shapes": [name, shape] pairs in prunable order; "aliases": name -> all the keys of a tied weight,
  itself first;
  "ties": the rule by which equal scores were ordered when the masks were chosen; "digest": SHA-256 over the JSON of
  "shapes" (separators "," and ":") followed by the packed bytes in that order; "provenance": what the caller recorded
  (pruner, pattern, pool, sparsity, seed, config, digest of the model, versions); "checksum": SHA-256 over the JSON of
  all these (sorted keys), which older files lack. A file is written beside its final place, flushed to disk and
  renamed, so that no half-written mask file is ever seen.

`load` also reads the public mask files: pickles (or safetensors) of `<layer>.weight_pruning_mask`, bool or float, bare
or nested under "model", with an entry for every key of a tied weight; all-ones `<layer>.bias_pruning_mask` entries are
passed over.

Digest and checksum, or those of the archive that `torch.save` writes, are verified whenever a file is read.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sparsity.bits import Bits, ShapedTensors, is_binary, shape_in, tensors_digest
from sparsity.errors import MissingFileError, UserError, listed
from sparsity.files import check_archive, reading, write_atomic
from sparsity.mask_file import (
    METADATA,
    WEIGHT,
    BadFileError,
    begin_digest,
    check_digest,
    named,
    opened,
    public_entries,
    write_description,
)
from sparsity.view import PrunableView, canonical

logger = logging.getLogger(__name__)

TIES = "equal scores: prunable order, then row-major in (out, in), lowest index pruned first"
# Where `report` warns: a layer that keeps one weight in a thousand no longer carries a signal, and a modality that
# keeps one in fifty has collapsed.
_LAYER_LIMIT, _GROUP_LIMIT = 0.999, 0.98
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a floating-point number -> integers of its bits


class Masks(Mapping[str, Tensor]):
    """Masks by name, held packed: each is unpacked, on the CPU, when it is asked for.

    masks: name -> bool tensor or `Bits`, in prunable order, or pairs one by one. provenance: whatever can be written as
    JSON. aliases: name -> all keys of a tied weight. weights: name -> what the kept weights become, in the parameter's
    layout, from methods that update them, held or read one at a time (`ShapedTensors`); biases: key of a bias, or of
    any other parameter that is not prunable (norms) -> what it becomes. Both are put in wherever the masks are applied,
    and are no part of the mask file. errors: name -> what a method tells of the layer's error
    (`sparsity.reconstruction.errors`), for reports.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | Mapping[str, Bits] | Iterable[tuple[str, Tensor]],
        provenance: Mapping[str, Any] | None = None,
        aliases: Mapping[str, tuple[str, ...]] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
        errors: Mapping[str, Tensor] | None = None,
    ):
        self._bits: dict[str, Bits] = {}
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            if isinstance(mask, Tensor) and mask.dtype != torch.bool:
                raise UserError(f"the mask of {name!r} must be a bool tensor, got {mask.dtype}")
            self._bits[str(name)] = Bits.of(mask) if isinstance(mask, Tensor) else mask
        self.weights = weights if isinstance(weights, ShapedTensors) else dict(weights or {})
        for name in self.weights:
            shape = shape_in(self.weights, name)
            if name not in self._bits or shape != self._bits[name].shape:
                raise UserError(f"there is no mask of the shape {shape} for the weights of {name!r}")
        self.biases, self.errors = dict(biases or {}), dict(errors or {})
        self.provenance = dict(provenance or {})
        self.aliases = {name: tuple(keys) for name, keys in (aliases or {}).items() if len(keys) > 1}

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def total(self) -> int:
        return sum(bits.numel for bits in self._bits.values())

    @property
    def kept(self) -> int:
        return sum(bits.count() for bits in self._bits.values())

    def digest(self) -> str:
        """SHA-256 of names, shapes and bits: equal for equal masks, whatever their provenance."""
        return _sha(self._shapes(), self._packed()).hexdigest()

    def _shapes(self) -> list[list]:
        return [[name, list(bits.shape)] for name, bits in self._bits.items()]

    def _packed(self) -> dict[str, Tensor]:
        return {name: bits.packed for name, bits in self._bits.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that the module describes, whole or not at all."""
        packed, shapes = self._packed(), self._shapes()
        digest = _sha(shapes, packed).hexdigest()
        # One entry: the order in which safetensors writes several is not fixed.
        description = write_description(shapes, self.aliases, TIES, digest, self.provenance)
        write_atomic(Path(path), serialize(packed, {METADATA: description}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Masks":
        """Reads our files and the public ones. FileNotFoundError, or a one-line UserError that names the file."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"there is no mask file {str(path)!r}")
        with named(path):
            with reading(path), path.open("rb") as file:
                is_safetensors = file.read(9)[8:] == b"{"
            return cls._read_safetensors(path) if is_safetensors else cls._read_public(_unpickle(path))

    @classmethod
    def _read_safetensors(cls, path: Path) -> "Masks":
        with opened(path, "pt") as (file, description):
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if description is None:
            return cls._read_public(tensors)
        shapes = description["shapes"]
        check_digest(_sha(shapes, tensors), description)
        masks = cls({}, description["provenance"], description["aliases"])
        try:
            masks._bits = {name: Bits.read(tensors[name], shape) for name, shape in shapes}
        except UserError as error:
            raise BadFileError(str(error)) from error
        return masks

    @classmethod
    def _read_public(cls, content: Any) -> "Masks":
        masks = {}
        for key, value in public_entries(content):
            if not isinstance(value, Tensor) or not is_binary(value):
                raise BadFileError(f"{key!r} holds values other than 0 and 1")
            if key.endswith(WEIGHT):
                name = canonical(key.removesuffix(WEIGHT) + ".weight")
                if name in masks and not torch.equal(masks[name], value.bool()):
                    raise BadFileError(f"it has two masks of {name!r}, which differ")
                masks[name] = value.bool()
            elif not bool(value.all()):
                raise BadFileError(f"{key!r} prunes a bias, and biases are never pruned")
        if not masks:
            raise BadFileError(f"it has no key like '<layer>{WEIGHT}'")
        return cls(masks)

    def resolve(self, view: PrunableView) -> dict[str, Tensor]:
        """The masks under the names that this model gives its weights, in its order: all of them unpacked.

        A tied weight is found under any of its names. Masks of layers that the view keeps dense (momentum copies,
        heads) are left out. Raises one UserError that lists what is missing, unknown or misshapen.
        """
        return {name: self[own] for name, own in self._names(view).items()}

    def _names(self, view: PrunableView) -> dict[str, str]:
        """The names that this model gives its weights -> those of their masks; errors as `resolve`."""
        known, bits = self._known(self), self._bits
        used: set[str] = set()
        resolved: dict[str, str] = {}
        missing, misshapen = [], []
        for weight in view.weights.values():
            names = list(dict.fromkeys(known[alias] for alias in weight.aliases if alias in known))
            used.update(names)
            if not names:
                missing.append(weight.name)
            elif bits[names[0]].shape != weight.parameter.shape:
                misshapen.append(f"{weight.name} {bits[names[0]].shape} for {tuple(weight.parameter.shape)}")
            elif any(not torch.equal(bits[names[0]].packed, bits[name].packed) for name in names[1:]):
                misshapen.append(f"{weight.name} (tied to {names[1]}, with another mask)")
            else:
                resolved[weight.name] = names[0]
        ignored = [name for name in self if name in view.dense and name not in used]
        unknown = [name for name in self if name not in used and name not in view.dense]
        problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
        if any(problems.values()):
            lists = "; ".join(f"{len(names)} {kind}: {listed(names, 3)}" for kind, names in problems.items() if names)
            raise UserError(f"the masks do not fit this model: {lists}")
        if any(bits[name].count() < bits[name].numel for name in ignored):
            logger.warning("masks of layers that this model keeps dense are not used: %s", listed(ignored, 3))
        return resolved

    def check(self, view: PrunableView) -> None:
        """Raises one UserError that lists what is missing, unknown or misshapen for this model."""
        self._names(view)

    def apply(self, view: PrunableView) -> None:
        """Zero the pruned weights in place, under all their names, and write those that the method has updated.

        Nothing is changed when the masks do not fit.
        """
        names, updated = self._names(view), self._updated(view)
        for name, own in names.items():
            self._change(view.weights[name].parameter, own, updated.get(name))
        with torch.no_grad():
            for bias, new in self._biases(view):
                bias.copy_(new)

    @torch.no_grad()
    def _change(self, parameter: Tensor, own: str, updated: str | None) -> None:
        """Prune one weight in place. own, updated: the names of its mask and, where there is one, of its update."""
        if updated is not None:
            parameter.copy_(self.weights[updated])
        parameter.masked_fill_(~self[own].to(parameter.device), 0)

    def _updated(self, view: PrunableView) -> dict[str, str]:
        """The names that this model gives its weights -> those of their updates."""
        known = self._known(self.weights)
        found = {name: [known[key] for key in weight.aliases if key in known] for name, weight in view.weights.items()}
        return {name: own[0] for name, own in found.items() if own}

    def _biases(self, view: PrunableView) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters beside the weights that change, with what they become."""
        known = view.parameters if self.biases else {}
        return [(known[key], new) for key, new in self.biases.items() if key in known]

    def _known(self, names: Iterable[str]) -> dict[str, str]:
        """Every key of a weight -> which of these names it goes by here."""
        return {key: name for name in names for key in (name, *self.aliases.get(name, ()))}

    @contextmanager
    def applied(self, view: PrunableView) -> Iterator[None]:
        """The pruned model inside the block; afterwards every weight is what it was, also after an exception.

        Weights change in place: whatever shares their memory sees it. What they were is held on the CPU, of a weight
        that is updated all, else the pruned values alone.
        """
        names, updated = self._names(view), self._updated(view)
        with ExitStack() as stack:
            for name, own in names.items():
                parameter = view.weights[name].parameter
                where = None if name in updated else own
                before = parameter.detach() if where is None else parameter.detach()[~self[own].to(parameter.device)]
                stack.callback(self._put_back, parameter, where, before.to("cpu", copy=where is None))
                self._change(parameter, own, updated.get(name))
            for bias, new in self._biases(view):
                stack.callback(self._put_back, bias, None, bias.detach().to("cpu", copy=True))
                with torch.no_grad():
                    bias.copy_(new)
            yield

    @torch.no_grad()
    def _put_back(self, parameter: Tensor, own: str | None, before: Tensor) -> None:
        """Undo `_change`. own: the name of the mask whose pruned weights `before` holds; None: it holds all."""
        if own is None:
            parameter.copy_(before)
        else:
            parameter[~self[own].to(parameter.device)] = before.to(parameter.device)

    def hold(self, view: PrunableView, optimizer: torch.optim.Optimizer) -> "Hold":
        """Apply the masks, and return the object that keeps the zeros in training."""
        self.apply(view)
        return Hold(self, view, optimizer)

    def report(self, view: PrunableView) -> "Report":
        """Kept and total weights per layer and group, with warnings where one collapses."""
        report = Report()
        for name, own in self._names(view).items():
            group, kept, total = view.weights[name].group, self._bits[own].count(), self._bits[own].numel
            report.layers[name] = Count(kept, total)
            before = report.groups.get(group, Count(0, 0))
            report.groups[group] = Count(before.kept + kept, before.total + total)
        return report


class Hold:
    """Keep pruned weights at zero while a model trains.

    A weight that is zero, with a zero gradient and zero moments, stays zero under weight decay and momentum alike: so
    masking the gradients before each step is all that is needed. `verify` makes sure of it before a checkpoint is
    written.
    """

    def __init__(self, masks: Masks, view: PrunableView, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._kept = []  # (parameter, its mask as a byte: all bits set where it is kept)
        for name, mask in masks.resolve(view).items():
            parameter = view.weights[name].parameter
            self._kept.append((parameter, mask.to(parameter.device, torch.int8).neg_()))
        self._clear_moments()  # a resumed optimizer may have moved while the model was dense

    def before_step(self) -> None:
        """Zero the gradients of pruned weights. Call it after backward (and unscaling), before clipping.

        Their bits are cleared, which is faster than masked_fill_, and not multiplied: an inf of fp16 times zero would
        be NaN.
        """
        for parameter, kept in self._kept:
            if parameter.grad is not None:
                parameter.grad.view(_BITS[parameter.grad.itemsize]).bitwise_and_(kept)

    @torch.no_grad()
    def verify(self) -> int:
        """Return how many pruned weights are not zero; set them back to zero, with the optimizer's moments."""
        violations = 0
        for parameter, kept in self._kept:
            moved = int((parameter != 0).logical_and_(kept == 0).count_nonzero())
            if moved:
                parameter.masked_fill_(kept == 0, 0)
                violations += moved
        if violations:
            self._clear_moments()
            logger.warning("%d pruned weights had moved from zero, and were set back", violations)
        return violations

    @torch.no_grad()
    def _clear_moments(self) -> None:
        for parameter, kept in self._kept:
            for moment in self._optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.masked_fill_((kept == 0).to(moment.device), 0)


@dataclass(frozen=True)
class Count:
    """Weights kept, of how many."""

    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.total


@dataclass
class Report:
    """Counts of what masks leave of each layer and each group."""

    layers: dict[str, Count] = field(default_factory=dict)
    groups: dict[str, Count] = field(default_factory=dict)

    @property
    def overall(self) -> Count:
        return Count(sum(c.kept for c in self.layers.values()), sum(c.total for c in self.layers.values()))

    @property
    def warnings(self) -> list[str]:
        """A line for each layer with at least 99.9 % and each group with at least 98 % of its weights gone."""
        kinds = (("group", self.groups, _GROUP_LIMIT), ("layer", self.layers, _LAYER_LIMIT))
        return [
            f"{kind} {name} has collapsed: {count.kept} of {count.total} weights are left"
            for kind, counts, limit in kinds
            for name, count in counts.items()
            if count.sparsity >= limit
        ]


def model_digest(view: PrunableView) -> str:
    """SHA-256 over the names, shapes and bytes of the prunable weights."""
    return tensors_digest({weight.name: weight.parameter for weight in view.weights.values()})


def state_digest(model: nn.Module) -> str:
    """SHA-256 over all that a model holds: what is kept dense decides its gradients and results, too."""
    return tensors_digest(model.state_dict())


def _sha(shapes: list[list], packed: Mapping[str, Tensor]) -> Any:
    sha = begin_digest(shapes)
    for name, _ in shapes:
        sha.update(packed[name].numpy().data)
    return sha


def _unpickle(path: Path) -> Any:
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickles, which says less than the error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise BadFileError("neither safetensors nor a pickle of tensors could be read from it") from error
