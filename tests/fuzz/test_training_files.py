"""Training snapshots and gradient rows: what was written, or one line; rows that are damaged are computed again."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.training.checkpoint import load_checkpoint
from sparsity.errors import UserError
from sparsity.statistics.row_stores import File, Scratch
from tests.fuzz.damage import check, damaged_bytes, damaged_json, fuzzed, same

pytestmark = pytest.mark.script

torch.manual_seed(0)
KEYS = ("step", "identity", "model", "optimizer", "precision")
STATE = {
    "step": 3,
    "identity": {"lr": 0.1, "files": ["a.json"], "seed": None},
    "model": {"a.weight": torch.randn(4, 6), "a.bias": torch.zeros(4), "count": torch.tensor(2)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 6)}}, "param_groups": [{"lr": 1}]},
    "precision": {},
    "best": {"step": 2, "value": 0.5},
}
buffer = io.BytesIO()
torch.save(STATE, buffer)
SNAPSHOT = buffer.getvalue()


@fuzzed
@given(content=damaged_bytes(SNAPSHOT))
def test_snapshots(folder, content):
    path = folder / "last.pt"
    path.write_bytes(content)
    check("snapshots", path, lambda: load_checkpoint(path, KEYS), lambda state: same(state, STATE))


@fuzzed
@given(content=damaged_json(STATE | {"optimizer": {}}))
def test_snapshots_of_something_else(folder, content):
    path = folder / "last.pt"
    torch.save(content, path)
    check("snapshots, other content", path, lambda: load_checkpoint(path, KEYS), lambda state: same(state, content))


IMAGES, ROWS = [2, 3, 1], torch.randn(3, 5)


def stored(folder) -> File:
    return File(Scratch(folder / "gradients", "data and model"), 5, torch.float32)


@pytest.mark.parametrize("part", ["account, bytes", "account, values", "rows"])
@fuzzed
@given(data=st.data())
def test_gradient_rows(folder, data, part):
    for path in folder.glob("gradients.*"):
        path.unlink()
    store = stored(folder)
    for row, images in zip(ROWS, IMAGES, strict=True):
        store.append([row[:2], row[2:]], images, 1, [])
    path = store.path if part == "rows" else store.account
    content = path.read_bytes()
    if part == "account, values":
        path.write_text(json.dumps(data.draw(damaged_json(json.loads(content)))))
    else:
        path.write_bytes(data.draw(damaged_bytes(content)))

    def load_rows():
        found = stored(folder)
        if not found.images:
            raise UserError(path.name)  # counted as refused
        return found.images, found.rows().clone()

    def right(found):
        images, rows = found
        return images == IMAGES[: len(images)] and same(rows, ROWS[: len(images)])

    check("gradient rows", path, load_rows, right)
