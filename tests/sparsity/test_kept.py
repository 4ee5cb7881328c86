"""Tensors that lie in files until they are asked for, and masks that carry them."""

import pytest
import torch

from sparsity.errors import MissingFileError, UserError
from sparsity.masks import Masks
from sparsity.resume.kept import StoredTensors, load_kept, save_kept
from tests.toys import Attention, view_of


@pytest.fixture
def view():
    return view_of(Attention(), keep_dense=["head"])


def updates(view, seed=1):
    """Masks and what the kept weights become, name -> tensor."""
    generator = torch.Generator().manual_seed(seed)
    kept = {n: torch.rand(w.parameter.shape, generator=generator) > 0.5 for n, w in view.weights.items()}
    return kept, {name: torch.randn(mask.shape, generator=generator) * mask for name, mask in kept.items()}


def stored(folder, tensors):
    """A file for each tensor."""
    result = StoredTensors()
    for number, (name, tensor) in enumerate(tensors.items()):
        path = folder / f"block{number}"
        save_kept(path, {f"weight {name}": tensor}, {"identity": "x"})
        result.add(path, {name: f"weight {name}"})
    return result


def test_what_is_read_is_what_was_written_also_after_the_files_are_gone(view, tmp_path):
    _, weights = updates(view)
    found = stored(tmp_path, weights)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.unlink() if number % 2 else save_kept(path, {"weight": torch.zeros(3)}, {"identity": "other"})
    assert list(found) == list(weights) and len(found) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight) and found.shape(name) == tuple(weight.shape)


def test_what_is_done_to_a_tensor_does_not_reach_the_file(view, tmp_path):
    _, weights = updates(view)
    found = stored(tmp_path, weights)
    found["q.weight"].zero_()
    assert torch.equal(found["q.weight"], weights["q.weight"])
    tensors, _ = load_kept(tmp_path / "block0", "x")
    assert torch.equal(tensors["weight q.weight"], weights["q.weight"])


def test_files_that_are_not_as_expected_are_named(tmp_path):
    save_kept(tmp_path / "whole", {"a": torch.zeros(2)}, {"identity": "x"})
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:20])
    with pytest.raises(MissingFileError, match="nowhere"):
        StoredTensors().add(tmp_path / "nowhere", {"a": "a"})
    with pytest.raises(UserError, match="cut: damaged"):
        StoredTensors().add(tmp_path / "cut", {"a": "a"})
    with pytest.raises(UserError, match="whole: has no tensor 'b'"):
        StoredTensors().add(tmp_path / "whole", {"a": "a", "c": "b"})


class Counted(StoredTensors):
    """How many tensors were read."""

    read = 0

    def __getitem__(self, name):
        self.read += 1
        return super().__getitem__(name)


def test_masks_with_stored_weights_are_applied_as_those_with_held_ones(view, tmp_path):
    kept, weights = updates(view)
    lazy = Counted()
    lazy._places = stored(tmp_path, weights)._places
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    results = []
    masks = Masks(kept, aliases=view.aliases, weights=lazy)
    masks.save(tmp_path / "masks.safetensors")
    masks.check(view)
    masks.report(view)
    assert lazy.read == 0, "only what is applied is read"
    for carried in (lazy, weights):
        with Masks(kept, aliases=view.aliases, weights=carried).applied(view):
            results.append({name: w.parameter.detach().clone() for name, w in view.weights.items()})
            assert torch.equal(view.model.again.weight, view.model.up.weight)
        assert all(torch.equal(before[name], tensor) for name, tensor in view.model.state_dict().items())
    assert lazy.read == len(weights)
    for name, weight in weights.items():
        assert torch.equal(results[0][name], weight) and torch.equal(results[1][name], weight)


def test_stored_weights_of_another_shape_are_refused_without_being_read(view, tmp_path):
    kept, weights = updates(view)
    lazy = Counted()
    lazy._places = stored(tmp_path, weights | {"q.weight": torch.zeros(3, 3)})._places
    with pytest.raises(UserError, match=r"no mask of the shape \(3, 3\) for the weights of 'q.weight'"):
        Masks(kept, weights=lazy)
    assert lazy.read == 0
