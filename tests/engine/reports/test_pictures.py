"""The pictures of a run: what they show, and which masks of other pruners they are compared with."""

import pytest

import pruners
from engine.reports.pictures import Pictures
from sparsity.masks import Masks
from sparsity.run.engine import Measured
from sparsity.run.request import Request
from tests.toys import layers, view_of


def masks_of(view, pruner, sparsity="0.63", seed=42):
    ((_, masks),) = pruners.build(pruner).masks(view, Measured(), Request([sparsity], seed=seed))
    return masks


@pytest.fixture
def view():
    return view_of(layers((30, 10), (4, 5)), group_of=lambda name: "all")


def run(folder, view, pruner, *, model="m", label="63", sparsity="0.63", seed=42):
    """The pictures of a run of its own, drawn."""
    folder /= pruner
    masks = masks_of(view, pruner, sparsity, seed)
    path = folder / f"{model}_{pruner}_{label}_seed{seed}_pruning_masks.safetensors"
    masks.save(path)
    pictures = Pictures(folder, view, model, f"{model}_{pruner}")
    pictures.add(label, masks, masks.report(view), path)
    return pictures


def test_groups_have_the_sparsity_of_their_weights_not_the_mean_of_the_layers(tmp_path, view):
    pictures = run(tmp_path, view, "omp")
    gone = 0.63 * 320 // 1
    assert pictures.groups["63"]["all"] == pytest.approx(100 * gone / 320)
    mean = sum(pictures.layers["63"].values()) / 2
    assert abs(mean - pictures.groups["63"]["all"]) > 0.1
    assert sum(pictures.magnitudes["63"]["all"]) == 320 - gone


@pytest.mark.script
def test_alone_there_is_no_overlap(tmp_path, view):
    stale = tmp_path / "omp" / "overlap.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier run")
    drawn = run(tmp_path, view, "omp").draw("title")
    assert [picture.file for picture in drawn] == ["sparsity.png", "heatmap.png", "magnitudes.png"]
    assert {p.name for p in (tmp_path / "omp").glob("*.png")} == {picture.file for picture in drawn}


@pytest.mark.script
def test_masks_of_the_same_model_sparsity_and_seed_are_compared(tmp_path, view, monkeypatch):
    for pruner, options in (("lamp", {}), ("rand", {"seed": 1}), ("l2", {"label": "64", "sparsity": "0.64"})):
        run(tmp_path, view, pruner, **options)
    other = view_of(layers((30, 10), (4, 5), seed=9), group_of=lambda name: "all")
    run(tmp_path, other, "localmp")
    damaged = tmp_path / "snip" / "m_snip_63_seed42_pruning_masks.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"junk")
    shown = {}
    monkeypatch.setattr("engine.reports.pictures.plot_overlap", lambda path, overlaps, title: shown.update(overlaps))
    overlap = run(tmp_path, view, "omp").draw("title")[-1]
    names, kept, pruned, share = shown["63"]
    assert names == ["omp", "lamp"] and share == pytest.approx(0.37, abs=0.01)
    one, two = (Masks.load(tmp_path / n / f"m_{n}_63_seed42_pruning_masks.safetensors") for n in ("omp", "lamp"))
    both = sum(int((one[name] & two[name]).sum()) for name in one)
    either = sum(int((one[name] | two[name]).sum()) for name in one)
    assert kept[0, 1] == both / either and pruned[0, 1] == (320 - either) / (320 - both)
    _, note = overlap.notes
    assert "localmp/m_localmp_63_seed42_pruning_masks.safetensors (masks of another model)" in note
    assert "snip/m_snip_63_seed42_pruning_masks.safetensors (not a usable mask file)" in note
    assert "rand" not in note and "l2/" not in note
