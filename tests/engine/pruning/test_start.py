"""The files of a run that another one begins with."""

import pytest
import torch
from safetensors.torch import save_file

import pruners
from engine.pruning.start import load_start
from sparsity.errors import UserError
from tests.toys import Attention, layers, view_of


def batches():
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_masks_weights_and_biases_are_those_of_the_files(tmp_path, caplog):
    torch.manual_seed(0)
    view = view_of(Attention().eval())
    masks = pruners.prune(view, "wanda", sparsity=0.4, reconstruct="lsq", correct_bias=True, data=batches())
    mask, weights = tmp_path / "m_pruning_masks.safetensors", tmp_path / "m_weights.safetensors"
    masks.save(mask)
    save_file({**{name: masks.weights[name].contiguous() for name in masks.weights}, **masks.biases}, weights)
    alone = load_start(view, mask)
    assert alone is not None and alone.digest() == masks.digest() and not alone.weights
    assert f"--from_weights {weights} has updated ones" in caplog.text
    both = load_start(view, mask, weights)
    assert both is not None and masks.biases and set(both.biases) == set(masks.biases)
    assert all(torch.equal(both.weights[name], masks.weights[name]) for name in view.weights)
    assert all(torch.equal(both.biases[key], bias) for key, bias in masks.biases.items())
    assert load_start(view, None) is None


def test_files_of_another_model_are_refused_in_one_line(tmp_path):
    view, other = view_of(layers((4, 5))), view_of(layers((4, 6)))
    pruners.prune(other, "omp", sparsity=0.4).save(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="--from_mask .*m.safetensors: the masks do not fit"):
        load_start(view, tmp_path / "m.safetensors")
    pruners.prune(view, "omp", sparsity=0.4).save(tmp_path / "m.safetensors")
    for tensors, told in (({"b.weight": torch.ones(2)}, "a.weight"), ({"a.weight": torch.ones(4, 6)}, "shape")):
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=told):
            load_start(view, tmp_path / "m.safetensors", tmp_path / "w.safetensors")
