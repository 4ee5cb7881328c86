"""Gradient rows: autograd's, whatever the place; gone on with after a kill; refused where there is no room."""

import copy
import json
import shutil
from collections import namedtuple
from threading import Thread

import pytest
import torch
from torch import nn

from sparsity.statistics.gradient_rows import Rows, Scratch, batch_images, fit, gradient_rows, human, room
from sparsity.statistics.gradients import mean_gradients
from tests.rounding import assert_same_sums
from tests.toys import Attention, Conv1D, Ranks, view_of

LARGE = 10**9


class Toy(nn.Module):
    """Tied weights, a Conv1D, dropout, and a queue that every loss moves on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.conv, self.dropout = Attention(8), Conv1D(5, 3), nn.Dropout(0.5)
        self.register_buffer("queue", torch.ones(5))

    def loss(self, batch):
        out = self.dropout(self.conv(self.attention(batch)))
        loss = (out - self.queue).square().mean()
        self.queue.mul_(0.5)
        return loss


@pytest.fixture
def toy():
    """View, six batches of three images, and the losses that were asked for."""
    model, asked = Toy().train(), []

    def loss(batch, generator):
        asked.append(batch)
        return model.loss(batch)

    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, 8, generator=generator) for _ in range(6)]
    return view_of(model, keep_dense=["attention.head"], loss=loss), batches, asked


def rows_of(view, batches, *, rounds=None, budget=LARGE, **options):
    return gradient_rows(view, batches, rounds=rounds or [1] * len(batches), budget=budget, **options)


def whole(rows):
    return rows.read(0, rows.width).clone()


def naive(view, batch):
    """The gradient of one batch, in evaluation mode: a row."""
    model = copy.deepcopy(view.model).eval()
    model.loss(batch).backward()
    weights = dict(model.named_parameters())
    grads = [weights[name].grad.t() if w.transposed else weights[name].grad for name, w in view.weights.items()]
    return torch.cat([grad.flatten() for grad in grads])


# What they are


def test_rows_are_the_gradients_of_the_batches_each_from_the_model_as_it_was(toy):
    view, batches, _ = toy
    before = copy.deepcopy(view.model.state_dict())
    rows = rows_of(view, batches)
    expected = torch.stack([naive(view, batch) for batch in batches])
    torch.testing.assert_close(whole(rows), expected)
    assert rows.n == 6 and rows.images == 18 and rows.batch_size == 3
    assert view.model.training and all(p.grad is None for p in view.model.parameters())
    assert all(torch.equal(before[key], value) for key, value in view.model.state_dict().items())
    torch.testing.assert_close(rows.read(7, 20), expected[:, 7:20])
    torch.testing.assert_close(rows.sum(), expected.sum(0))
    vector = torch.randn(rows.width)
    pieces = [(start, vector[start : start + 31]) for start in range(0, rows.width, 31)]
    assert_same_sums(rows.product(pieces).float(), expected @ vector, expected * vector, dim=1)


def test_a_row_is_the_mean_over_its_round(toy):
    view, batches, _ = toy
    single = whole(rows_of(view, batches))
    rows = rows_of(view, batches, rounds=[2, 2, 2])
    assert rows.n == 3 and rows.batch_size == 6
    torch.testing.assert_close(whole(rows), single.view(3, 2, -1).mean(1))


def test_their_mean_is_the_mean_gradient(toy):
    view, batches, _ = toy
    view._loss = lambda batch, _: view.model.attention(batch).square().mean()
    view.weights.pop("conv.weight")
    mean = torch.cat([g.flatten() for g in mean_gradients(view, batches).values()])
    torch.testing.assert_close(rows_of(view, batches).sum() / 6, mean)


def test_results_do_not_depend_on_how_many_columns_are_looked_at_together(toy, monkeypatch):
    view, batches, _ = toy
    rows = rows_of(view, batches)
    total, product = rows.sum(), rows.product([(0, torch.ones(rows.width))])
    monkeypatch.setattr("sparsity.statistics.gradient_rows._PIECE", {"cpu": 30})
    again = rows_of(view, batches)
    torch.testing.assert_close(again.sum(), total)
    assert_same_sums(again.product([(0, torch.ones(rows.width))]), product, whole(rows), dim=1)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(3, 2), 3),
        ({"text": torch.zeros(8), "image": torch.zeros(3)}, 3),  # more texts than images, as with regions
        ({"pixel_values": torch.zeros(4)}, 4),
        ({"pixel_values": torch.zeros(40, 12), "image_grid_thw": torch.zeros(2, 3)}, 2),  # patches of two images
        ({"anything": torch.zeros(5)}, 5),
        ((torch.zeros(2), torch.zeros(7)), 2),
    ],
)
def test_images_of_a_batch(batch, count):
    assert batch_images(batch) == count


# In memory or in a file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_holds_the_very_rows_that_memory_does(toy, tmp_path, dtype):
    view, batches, _ = toy
    inside = rows_of(view, batches, dtype=dtype)
    filed = rows_of(view, batches, dtype=dtype, budget=0, scratch=Scratch(tmp_path / "new" / "g", "data"))
    file = tmp_path / "new" / "g.rows"
    assert file.stat().st_size == 6 * view.numel * (4 if dtype == "float32" else 2)
    assert torch.equal(whole(filed), whole(inside)) and torch.equal(filed.sum(), inside.sum())
    filed.forget()
    assert not list((tmp_path / "new").iterdir())
    assert torch.equal(whole(filed), whole(inside)), "what is mapped stays readable"


@pytest.mark.parametrize("rounds", [[1] * 6, [2, 2, 2]])
def test_a_run_that_was_killed_goes_on(toy, tmp_path, rounds):
    view, batches, asked = toy
    expected, scratch = whole(rows_of(view, batches, rounds=rounds)), Scratch(tmp_path / "g", "data")

    def broken():
        yield from batches[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_of(view, broken(), rounds=rounds, budget=0, scratch=scratch)
    with (tmp_path / "g.rows").open("ab") as file:
        file.write(b"half a row")
    asked.clear()
    rows = rows_of(view, iter(batches), rounds=rounds, budget=0, scratch=scratch)
    assert len(asked) == (1 if len(rounds) == 6 else 2), "only what is missing is computed"
    assert torch.equal(whole(rows), expected) and rows.images == 18
    asked.clear()
    unread = iter(batches)
    assert torch.equal(whole(rows_of(view, unread, rounds=rounds, budget=0, scratch=scratch)), expected)
    assert not asked and len(list(unread)) == 6, "nothing is read when all rows are there"


def test_rows_of_other_data_another_model_or_type_are_not_used(toy, tmp_path):
    view, batches, asked = toy

    def computed(identity="data", dtype="float32", rounds=(1,) * 6):
        asked.clear()
        rows_of(view, batches, rounds=rounds, dtype=dtype, budget=0, scratch=Scratch(tmp_path / "g", identity))
        return len(asked)

    assert [computed(), computed()] == [6, 0]
    assert [computed("other data"), computed("other data")] == [6, 0]
    assert computed("other data", "bfloat16") == 6
    assert computed("other data", "bfloat16", [2, 2, 2]) == 6
    view.model.attention.head.weight.data.add_(1)  # dense, but it decides the gradients
    assert computed("other data", "bfloat16", [2, 2, 2]) == 6
    with torch.autocast("cpu", torch.bfloat16):
        assert computed("other data", "bfloat16", [2, 2, 2]) == 6


@pytest.mark.parametrize("damage", ["{", "gone", "short"])
def test_a_damaged_account_starts_anew(toy, tmp_path, damage):
    view, batches, asked = toy
    scratch = Scratch(tmp_path / "g", "data")
    expected = whole(rows_of(view, batches, budget=0, scratch=scratch))
    if damage == "gone":
        (tmp_path / "g.rows").unlink()
    elif damage == "short":
        (tmp_path / "g.rows").write_bytes(b"1234")
    else:
        (tmp_path / "g.json").write_text(damage)
    asked.clear()
    assert torch.equal(whole(rows_of(view, batches, budget=0, scratch=scratch)), expected) and len(asked) == 6


def test_rows_that_are_mapped_do_not_change_under_new_ones(toy, tmp_path):
    view, batches, _ = toy
    first = rows_of(view, batches, budget=0, scratch=Scratch(tmp_path / "g", "data"))
    expected = whole(first)
    rows_of(view, batches[::-1], budget=0, scratch=Scratch(tmp_path / "g", "other"))
    assert torch.equal(whole(first), expected)


def test_an_account_names_whole_rows_only(toy, tmp_path):
    """The row that breaks off is not counted, and the account is never half written."""
    view, batches, _ = toy
    bad = [batches[0], batches[1] * float("inf")]
    with pytest.raises(ValueError, match=r"gradient of layer 'attention\.q\.weight' holds NaN or Inf"):
        rows_of(view, bad, budget=0, scratch=Scratch(tmp_path / "g", "data"))
    assert json.loads((tmp_path / "g.json").read_text())["images"] == [3]
    assert {path.name for path in tmp_path.iterdir()} == {"g.json", "g.rows"}


# Room


def disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_memory_then_disk_then_a_refusal_that_names_what_fits(tmp_path, monkeypatch):
    disk(monkeypatch, 4500)
    sizes = {"width": 100, "dtype": "float32", "folder": tmp_path / "not" / "there"}
    assert fit(rounds=[2] * 3, budget=1200, **sizes)
    assert not fit(rounds=[2] * 4, budget=1200, **sizes)
    assert not fit(rounds=[2] * 11, budget=1200, **sizes)
    with pytest.raises(
        ValueError, match="need 4.8 KB, more than --memory_budget 1.2 KB.*at most --num_batches 11 fits"
    ):
        fit(rounds=[2] * 12, budget=1200, **sizes)
    assert not fit(rounds=[2] * 12, budget=1200, **sizes | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="at most --num_batches 15 fits"):
        fit(rounds=[2] * 16, budget=6000, **sizes)
    with pytest.raises(ValueError, match="at most --num_batches 5 fits"):
        fit(rounds=[2] * 6, budget=1200, held=2, **sizes)
    with pytest.raises(ValueError, match="no folder to write to: not even one batch fits; raise --memory_budget"):
        fit(100, [1], "float32", 399, None)
    assert not (tmp_path / "not").exists()


def test_a_rank_counts_its_own_rows_in_memory_and_all_on_disk(tmp_path, monkeypatch):
    disk(monkeypatch, 1500)
    assert fit(100, [1, 0] * 3, "float32", 1200, tmp_path)
    assert fit(100, [0, 0], "float32", 0, tmp_path)
    with pytest.raises(ValueError, match="at most --num_batches 4 fits"):
        fit(100, [1, 0] * 4, "float32", 800, tmp_path)


def test_rows_that_are_there_already_need_no_more_room(tmp_path, monkeypatch):
    disk(monkeypatch, 100)
    (tmp_path / "g.rows").write_bytes(bytes(60))
    assert room(tmp_path) == 160 and room(tmp_path / "none") == 100


def test_nothing_runs_without_room(toy):
    view, batches, asked = toy
    with pytest.raises(ValueError, match="no folder"):
        rows_of(view, batches, budget=100)
    assert not asked


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1200, "1.2 KB"), (2.2e12, "2.2 TB")])
def test_bytes_as_people_read_them(count, text):
    assert human(count) == text


# What cannot be


def test_what_cannot_be_is_said(toy):
    view, batches, _ = toy
    with pytest.raises(ValueError, match="no calibration batches"):
        rows_of(view, [], rounds=[1])
    view._loss = lambda batch, _: view.model.attention(batch).sum()
    with pytest.raises(ValueError, match=r"layer 'conv\.weight' got no gradient"):
        rows_of(view, batches)


def test_data_that_ends_early_makes_fewer_rows(toy):
    view, batches, _ = toy
    rows = rows_of(view, batches[:4], rounds=[1] * 6)
    assert rows.n == 4 and rows.images == 12
    assert torch.equal(whole(rows), whole(rows_of(view, batches[:4])))


# Ranks


@pytest.mark.parametrize(
    "shares",
    [
        [[(0, 1), (), (4, 5)], [(), (2, 3), ()]],  # whole rounds
        [[(0,), (2,), (4,)], [(1,), (3,), (5,)]],  # a batch of each round
        [[(0, 1), (2, 3), (4, 5)], [(), (), ()]],  # a rank without any
    ],
)
def test_ranks_read_together_what_one_reads(toy, shares):
    view, batches, _ = toy
    alone, found, reduce = rows_of(view, batches, rounds=[2, 2, 2]), {}, Ranks(2)
    views = [copy.deepcopy(view) for _ in shares]
    for own in views:
        own._loss = lambda batch, _, model=own.model: model.loss(batch)

    def rank(number, share):
        mine = [batches[i] for together in share for i in together]
        rounds = [len(together) for together in share]
        rows = gradient_rows(views[number], mine, rounds=rounds, budget=LARGE, reduce=reduce)
        found[number] = (whole(rows), rows.sum(), rows.product([(0, torch.ones(rows.width))]), rows.batch_size)

    threads = [Thread(target=rank, args=item) for item in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = (whole(alone), alone.sum(), alone.product([(0, torch.ones(alone.width))]), alone.batch_size)
    for number in range(2):
        read, total, product, batch_size = found[number]
        torch.testing.assert_close((read, total, batch_size), (expected[0], expected[1], expected[3]))
        assert_same_sums(product, expected[2], expected[0], dim=1)
    assert torch.equal(found[0][0], found[1][0])


def test_rows_are_found_by_their_numbers():
    own = torch.arange(6.0).view(2, 3)
    rows = Rows(own, [2, 0], 3, 6, reduce=lambda tensor: tensor)
    assert torch.equal(rows.read(0, 3), torch.stack([own[1], torch.zeros(3), own[0]]))
    assert rows.product([(1, torch.ones(2))]).tolist() == [9.0, 0.0, 3.0]
