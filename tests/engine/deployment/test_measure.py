"""Counts and report of a benchmark: operations, turns, and no ratio within the noise."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.deployment.measure import GPUS, Variant, measure, multiply_adds, peak_memory, quartiles, roofline
from engine.deployment.packed_files import write_packed
from engine.deployment.report import NOISE, rows_of, write_speed
from sparsity.pattern import NM, Block


def test_multiply_adds_are_those_of_the_layers_that_are_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(16, 5), nn.Flatten())
    model[2].weight.data[:, :12] = 0
    images = torch.randn(2, 3, 8, 8)
    dense, sparse = multiply_adds(model, lambda: model(images), 2)
    convolution = 16 * 4 * 3 * 2 * 2  # 16 places
    assert (dense, sparse) == (convolution + 4 * 5 * 16, convolution + 4 * 5 * 4)


def test_every_variant_is_measured_in_every_round_and_in_other_orders() -> None:
    calls, ticks = [], iter(range(1000))
    variants = [Variant(name, lambda batch, name=name: calls.append((name, batch))) for name in "abc"]
    variants.append(Variant("file", None))
    measure(variants, [1, 4], rounds=3, clock=lambda: float(next(ticks)))
    assert [each.seconds for each in variants[:3]] == [{1: [1.0] * 3, 4: [1.0] * 3}] * 3 and not variants[3].seconds
    timed = [name for name, batch in calls if batch == 4][6:]  # each has run twice, to get warm and for its memory
    assert timed == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_peak_memory_is_what_a_call_takes() -> None:
    assert 60e6 < peak_memory(lambda: torch.ones(20_000_000)) < 140e6


def test_no_ratio_within_the_noise(tmp_path: Path) -> None:
    dense = Variant("dense", None, bytes=2_000_000, operations=4_000_000, parameters=10, seconds={2: [1.0, 1.1, 1.2]})
    near = Variant("near", None, seconds={2: [1.05, 1.1, 1.3]})
    fast = Variant("fast", None, seconds={2: [0.5, 0.55, 0.6]}, quality={"top-1": 12.0})
    packed = Variant("packed", None, bytes=1)
    rows = rows_of([dense, near, fast, packed], [2])
    assert [row["times as fast"] for row in rows] == ["1.00", NOISE, "2.00", "as masked"]
    assert [row["top-1"] for row in rows] == ["-", "-", "12.00", "-"] and rows[0]["samples/s"] == "1.8"
    told = write_speed(tmp_path, "Speed", {"model": "m"}, [dense, near, fast, packed], [2], "| layers |")
    report = (tmp_path / "speed.md").read_text()
    assert told in report and "nothing of it is measured" in report and "| layers |" in report
    with (tmp_path / "speed.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["dense", "near", "fast", "packed"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_quartiles_and_the_roofline_follow_their_formulas() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0) and quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    gpu = GPUS["H100"]
    assert roofline(gpu, 10**12, 1, 4) == pytest.approx(8e12 / 989e12)
    assert roofline(gpu, 10**12, 1, 4, semi_structured=True) == pytest.approx(4e12 / 989e12)
    assert roofline(gpu, 1, 10**9, 1) == pytest.approx(2e9 / 3.35e12)


@pytest.mark.parametrize(
    ("kept", "most"), [("2:4", 0.57), ("90", 0.17), ("block4x4 90", 0.11)], ids=["2:4", "90 %", "blocks"]
)
def test_packed_weights_take_what_is_promised(tmp_path: Path, kept: str, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    if kept == "2:4":
        weight *= NM(2, 4).keep(weight.abs())
    elif kept == "90":
        weight *= torch.rand(256, 256) < 0.1
    else:
        weight *= Block(4, 4).expand(torch.rand(64, 64) < 0.1)
    state = {"a.weight": weight, "a.bias": torch.randn(256), "embedding.weight": torch.randn(64, 8)}
    half = {name: tensor.half() for name, tensor in state.items()}
    told = write_packed(half, tmp_path / "p.safetensors", ["a.weight"])
    share = float(told.split("; ")[1].split()[0])
    assert share <= most, told
