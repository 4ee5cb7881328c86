"""Mask files, own and public, packed files, and what runs keep: the masks that were written, or one line."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from engine.reports.mask_overlap import overlap
from models.checkpoint import read_weights
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.packing import pack, unpack
from sparsity.resume.steps import Trail
from sparsity.run.sequential import Blocks, Solved
from sparsity.statistics.gradient_rows import Scratch
from sparsity.view import PrunableView
from tests.fuzz.damage import (
    ODD,
    check,
    damaged_bytes,
    damaged_json,
    damaged_safetensors,
    fuzzed,
    replaced_metadata,
    same,
)

pytestmark = pytest.mark.script

torch.manual_seed(0)
SHAPES = {"vision.a.weight": (3, 5), "vision.b.weight": (8, 16), "text.c.weight": (2, 3, 2, 2)}
BITS = {name: torch.rand(shape) > 0.4 for name, shape in SHAPES.items()}
PROVENANCE = {"pruner": "omp", "sparsity": "0.63", "seed": 42, "config": {"b": 1, "a": [2.5]}, "by step": {"1": 0.5}}
ALIASES = {"vision.a.weight": ("vision.a.weight", "text.a.weight")}


def written(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def own(folder):
    Masks(BITS, PROVENANCE, ALIASES).save(folder / "own.safetensors")
    return (folder / "own.safetensors").read_bytes()


def right(masks: Masks) -> bool:
    return same(dict(masks), BITS) and masks.provenance == PROVENANCE and masks.aliases == ALIASES


@fuzzed
@given(data=st.data())
def test_own_mask_files(folder, own, data):
    path = folder / "fuzzed.safetensors"
    path.write_bytes(data.draw(damaged_safetensors(own, "sparsity")))
    check("masks, own", path, lambda: Masks.load(path), right)


@fuzzed
@given(data=st.data())
def test_mask_files_of_older_versions(folder, own, data):
    """They have no checksum: what their JSON says of tied weights and provenance is taken, their masks are verified."""
    path, told = folder / "fuzzed.safetensors", {}

    def older(metadata):
        told.update({key: value for key, value in json.loads(metadata["sparsity"]).items() if key != "checksum"})
        changed = data.draw(damaged_json(dict(told)))
        told.clear()
        told.update(changed if isinstance(changed, dict) else {})
        return {"sparsity": json.dumps(changed)}

    path.write_bytes(replaced_metadata(own, older))

    def faithful(masks):
        aliases = {name: tuple(keys) for name, keys in told["aliases"].items() if len(keys) > 1}
        return same(dict(masks), BITS) and same(masks.provenance, told["provenance"]) and masks.aliases == aliases

    check("masks, own, older", path, lambda: Masks.load(path), faithful)


@fuzzed
@given(data=st.data())
def test_overlap_of_damaged_masks(folder, own, data):
    path = folder / "fuzzed.safetensors"
    path.write_bytes(data.draw(damaged_safetensors(own, "sparsity")))
    paths = [folder / "own.safetensors", path]
    check("masks, overlap", path, lambda: overlap(paths), lambda found: all((iou == 1).all() for iou in found))


PUBLIC = {
    f"{name.removesuffix('.weight')}{end}": value
    for name, mask in BITS.items()
    for end, value in ((".weight_pruning_mask", mask.float()), (".bias_pruning_mask", torch.ones(mask.shape[0])))
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@fuzzed
@given(data=st.data())
def test_public_mask_files(folder, data, dtype):
    content = {"model": {key: value.to(dtype) for key, value in PUBLIC.items()}, "epoch": 3}
    path = folder / "fuzzed.pth"
    path.write_bytes(data.draw(damaged_bytes(written(lambda file: torch.save(content, file)))))
    check("masks, public", path, lambda: Masks.load(path), lambda masks: same(dict(masks), BITS))


ODD_TENSORS = st.sampled_from(
    (
        *(torch.tensor(1.0), torch.empty(0), torch.full((2, 2), 0.5), torch.full((2,), torch.nan), torch.eye(3) * -1),
        *(torch.eye(3).to_sparse(), torch.empty(2, 2, device="meta"), torch.eye(3, dtype=torch.complex64)),
        *(torch.eye(4).to(torch.float8_e4m3fn), torch.eye(4).bfloat16(), torch.eye(4).long(), torch.eye(4).byte()),
        *(nn.Parameter(torch.eye(3)), np.eye(2)),
    )
)


@pytest.mark.parametrize("file_format", ["archive", "legacy", "safetensors"])
@fuzzed
@given(data=st.data())
def test_public_masks_of_other_kinds(folder, data, file_format):
    content = data.draw(damaged_json(PUBLIC | {"nested": {"model": 1}}, st.one_of(ODD, ODD_TENSORS)))
    if file_format == "safetensors":
        plain = content if isinstance(content, dict) else {}
        dense = {k: v.detach() for k, v in plain.items() if type(v) in (torch.Tensor, nn.Parameter)}
        dense = {k: v.clone() for k, v in dense.items() if not (v.is_sparse or v.is_meta)}
        content = dense
        written_file = save(dense)
    else:
        zipped = file_format == "archive"
        written_file = written(lambda file: torch.save(content, file, _use_new_zipfile_serialization=zipped))
    path = folder / "fuzzed.pth"
    path.write_bytes(written_file)

    def faithful(masks):
        keys = [key for key in content if str(key).endswith(".weight_pruning_mask")]
        expected = {key.removesuffix("_pruning_mask"): content[key].detach().to_dense().bool() for key in keys}
        return same(dict(sorted(masks.items())), dict(sorted(expected.items())))

    check("masks, public, odd values", path, lambda: Masks.load(path), faithful)


class Evil:
    """A pickle that would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x}, lambda x: {"a.weight_pruning_mask": x}])
def test_no_code_of_a_mask_file_runs(folder, wrap):
    path, left = folder / "evil.pt", folder / "left"
    for content in (pickle.dumps(wrap(Evil(left))), written(lambda file: torch.save(wrap(Evil(left)), file))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="evil.pt"):
            Masks.load(path)
        assert not left.exists()


# Packed files


def sparse(shape: tuple[int, ...], dtype: torch.dtype, nm: bool) -> torch.Tensor:
    weight = torch.randn(shape)
    keep = torch.arange(weight.numel()).view(shape) % 4 < 2 if nm else torch.rand(shape) > 0.7
    return (weight * keep + 0.0).to(dtype)  # no zero is -0


STATE = {
    "groups.weight": torch.stack([row.roll(i) for i, row in enumerate(sparse((8, 16), torch.float16, True))]),
    "blocks.weight": sparse((8, 16), torch.float16, True),  # whole columns are zero
    "across.weight": sparse((16, 7), torch.float32, True).reshape(7, 16).t().contiguous(),
    "mask.weight": sparse((7, 13), torch.float32, False),
    "conv.weight": sparse((3, 2, 3, 3), torch.bfloat16, False),
    "dense.weight": torch.randn(4, 6),
    "dense.bias": torch.randn(4),
    "steps": torch.tensor(3),
}
PACKED = save(*pack(STATE))


def unpacked(state: dict) -> bool:
    return same(dict(sorted(state.items())), dict(sorted(STATE.items())))


def test_packed_files_hold_every_kind():
    layouts = json.loads(pack(STATE)[1]["packed"])
    assert {(layout["pattern"], layout.get("dim")) for layout in layouts.values()} == {
        ("2:4", 1),
        ("2:4", 0),
        ("block4x1", None),
        (None, None),
    }
    assert unpacked(unpack(load(PACKED), pack(STATE)[1]))


@fuzzed
@given(data=st.data())
def test_packed_files(folder, data):
    path = folder / "fuzzed.safetensors"
    path.write_bytes(data.draw(damaged_safetensors(PACKED, "packed")))
    check("packed", path, lambda: read_weights(path), unpacked)


@fuzzed
@given(data=st.data())
def test_packed_files_of_older_versions(folder, data):
    """They have no digest: their weights are as many and as large as the file says, or refused."""
    path = folder / "fuzzed.safetensors"
    content = replaced_metadata(PACKED, lambda metadata: {"format": "pt", "packed": metadata["packed"]})
    assert unpacked(read_weights(_put(path, content)))
    layouts = data.draw(damaged_json(json.loads(pack(STATE)[1]["packed"])))
    _put(path, replaced_metadata(content, lambda metadata: metadata | {"packed": json.dumps(layouts)}))

    def faithful(state):
        return all(list(state[name].shape) == layout["shape"] for name, layout in layouts.items())

    check("packed, older", path, lambda: read_weights(path), faithful)


def _put(path, content):
    path.write_bytes(content)
    return path


# What a run keeps


def view() -> PrunableView:
    model = nn.ModuleDict({"a": nn.Linear(5, 3, bias=False), "b": nn.Linear(3, 4, bias=False)})
    return PrunableView(model, group_of=lambda name: "all", forward=model)


KEPT_BITS = {"a.weight": torch.rand(3, 5) > 0.5, "b.weight": torch.rand(4, 3) > 0.5}
UPDATED = {name: torch.randn(mask.shape) for name, mask in KEPT_BITS.items()}


def damaged(path, data):
    path.write_bytes(data.draw(damaged_safetensors(path.read_bytes(), "identity")))


@fuzzed
@given(data=st.data())
def test_steps_that_are_resumed(folder, data):
    """Damaged steps are computed again: nothing is refused."""
    provenance = {"pruner": "chita", "sparsity": "0.5"}
    trail = Trail(Scratch(folder / "run", "data and model"), provenance)
    trail.save(2, Masks(KEPT_BITS, provenance, weights=UPDATED))
    (path,) = folder.glob("*.step")
    damaged(path, data)

    def load_steps():
        step, masks = trail.load(view())
        if masks is None:
            raise UserError(path.name)  # counted as refused
        return step, dict(masks), masks.weights

    check("steps", path, load_steps, lambda found: same(found, (2, KEPT_BITS, UPDATED)))


@fuzzed
@given(data=st.data())
def test_blocks_that_are_resumed(folder, data):
    def blocks():
        origin = Scratch(folder / "seq", "data and model")
        return Blocks(view(), origin, label="0.5", method={"pruner": "sparsegpt"})

    done = blocks()
    done.save(0, {"a.weight": Solved(KEPT_BITS["a.weight"], UPDATED["a.weight"])})
    done.save(1, {"b.weight": Solved(KEPT_BITS["b.weight"])})
    path = folder / "seq_0.5.block1"
    damaged(path, data)

    def load_blocks():
        found = blocks()
        found.load([["a.weight"], ["b.weight"]])
        assert found.kept["a.weight"].tensor().equal(KEPT_BITS["a.weight"])
        if "b.weight" not in found.kept:
            raise UserError(path.name)
        return found

    def sound(found):
        return same(found.kept["b.weight"].tensor(), KEPT_BITS["b.weight"]) and list(found.updates) == ["a.weight"]

    check("blocks", path, load_blocks, sound)
