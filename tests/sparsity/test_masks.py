"""Mask files, applying and holding masks, and reports."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparsity.errors import UserError
from sparsity.masks import Masks, model_digest
from tests.toys import Attention, Conv1D, layers, view_of


def random_masks(view, seed=0, provenance=None):
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(weight.parameter.shape, generator=generator) > 0.5 for name, weight in view.weights.items()
    }
    return Masks(masks, provenance, {name: weight.aliases for name, weight in view.weights.items()})


@pytest.fixture
def view():
    return view_of(Attention(), keep_dense=["head"], group_of=lambda name: "mlp" if name[0] in "ud" else "attention")


@pytest.fixture
def masks(view):
    return random_masks(
        view, provenance={"pruner": "omp", "sparsity": "0.63", "seed": 42, "config": {"b": 1, "a": [2]}}
    )


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_round_trip(masks, tmp_path):
    masks.save(tmp_path / "new" / "masks.safetensors")
    loaded = Masks.load(tmp_path / "new" / "masks.safetensors")
    assert equal(masks, loaded)
    assert loaded.provenance == masks.provenance
    assert loaded.aliases == masks.aliases == {"up.weight": ("up.weight", "again.weight")}
    assert loaded.digest() == masks.digest()


def test_equal_masks_make_equal_bytes_and_leave_no_other_file(masks, tmp_path):
    masks.save(tmp_path / "one.safetensors")
    again = Masks(dict(masks), dict(reversed(masks.provenance.items())), masks.aliases)
    again.save(tmp_path / "two.safetensors")
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_the_file_is_what_the_documentation_says(tmp_path):
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]], dtype=torch.bool)
    Masks({"layer.weight": mask}, {"seed": 1}).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert list(file.keys()) == ["layer.weight"]
        assert file.get_tensor("layer.weight").tolist() == [0b00100001, 0b00000001]
        description = json.loads(file.metadata()["sparsity"])
    assert description["shapes"] == [["layer.weight", [2, 5]]]
    assert description["provenance"] == {"seed": 1}


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file_is_one_clear_line(masks, tmp_path, cut):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="masks.safetensors' is not a usable mask file") as error:
        Masks.load(path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_noticed(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="digest"):
        Masks.load(path)


@pytest.mark.parametrize(("old", "new"), [(b"again", b"agaim"), (b"omp", b"amp"), (b"aliases", b"aliasas")])
def test_a_description_that_is_not_as_it_was_written_is_noticed(masks, tmp_path, old, new):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UserError, match="description is damaged"):
        Masks.load(path)


def test_files_of_older_versions_are_read(masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["sparsity"])
        tensors = {name: file.get_tensor(name) for name in masks}
    assert description.pop("checksum")
    save_file(tensors, path, {"sparsity": json.dumps(description)})
    assert equal(Masks.load(path), masks)


def test_a_flipped_bit_of_a_public_file_is_noticed(masks, tmp_path):
    """torch.load does not look at the checksums of its archive."""
    public = {f"{name}_pruning_mask": mask for name, mask in masks.items()}
    torch.save(public, tmp_path / "public.pth")
    content = bytearray((tmp_path / "public.pth").read_bytes())
    place = content.find(bytes(masks["q.weight"].flatten().byte().tolist()))
    content[place] ^= 1
    (tmp_path / "public.pth").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "public.pth")["q.weight_pruning_mask"], masks["q.weight"])
    with pytest.raises(UserError, match="public.pth' is not a usable mask file"):
        Masks.load(tmp_path / "public.pth")


def test_archives_without_checksums_are_read(masks, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({f"{name}_pruning_mask": mask for name, mask in masks.items()}, tmp_path / "public.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(Masks.load(tmp_path / "public.pth"), masks)


def junk_text(path):
    path.write_text("this is no mask")


def junk_pickle(path):
    path.write_bytes(pickle.dumps({"a.weight_pruning_mask": print}))


def a_checkpoint(path):
    torch.save({"model": {"a.weight": torch.zeros(2, 2)}}, path)


def half_kept(path):
    torch.save({"a.weight_pruning_mask": torch.full((2, 2), 0.5)}, path)


def not_a_number(path):
    torch.save({"a.weight_pruning_mask": torch.full((2, 2), float("nan"))}, path)


def a_pruned_bias(path):
    torch.save({"a.weight_pruning_mask": torch.ones(2, 2), "a.bias_pruning_mask": torch.zeros(2)}, path)


def an_array(path):
    torch.save({"a.weight_pruning_mask": [1, 0]}, path)


def a_sparse_tensor(path):
    torch.save({"a.weight_pruning_mask": torch.eye(2).to_sparse()}, path)


def two_masks_of_a_layer(path):
    torch.save({"a.weight_pruning_mask": torch.ones(2, 2), "module.a.weight_pruning_mask": torch.eye(2)}, path)


def a_list(path):
    torch.save([torch.ones(2)], path)


def other_safetensors(path):
    save_file({"a.weight": torch.zeros(2, 2)}, path)


@pytest.mark.parametrize(
    "write",
    [
        *(junk_text, junk_pickle, a_checkpoint, half_kept, not_a_number, a_pruned_bias, an_array, a_list),
        *(other_safetensors, a_sparse_tensor, two_masks_of_a_layer),
    ],
)
def test_other_files_are_one_clear_line(write, tmp_path):
    write(tmp_path / "file.pt")
    with pytest.raises(ValueError, match="file.pt' is not a usable mask file") as error:
        Masks.load(tmp_path / "file.pt")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        Masks.load(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("nest", [None, "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_files_are_read(view, masks, tmp_path, dtype, nest, prefix):
    public = {}
    for name, mask in masks.items():
        for alias in view.weights[name].aliases:
            layer = prefix + alias.removesuffix(".weight")
            public[f"{layer}.weight_pruning_mask"] = mask.to(dtype)
            public[f"{layer}.bias_pruning_mask"] = torch.ones(mask.shape[0], dtype=dtype)
    torch.save({nest: public, "epoch": 3} if nest else public, tmp_path / "public.pt")
    loaded = Masks.load(tmp_path / "public.pt")
    assert "again.weight" in loaded
    assert equal(loaded.resolve(view), masks)


def test_tied_weights_with_different_masks_do_not_fit(view, masks):
    split = Masks({**masks, "again.weight": ~masks["up.weight"]})
    with pytest.raises(ValueError, match="tied to again.weight"):
        split.check(view)


def test_what_does_not_fit_is_listed_in_one_error(view, masks):
    wrong = dict(masks)
    for name in ("q.weight", "k.weight"):
        del wrong[name]
    wrong["x.weight"] = wrong["v.weight"]
    wrong["down.weight"] = wrong["down.weight"].t()
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        Masks(wrong).apply(view)
    message = str(error.value)
    assert "2 missing: q.weight, k.weight" in message
    assert "1 unknown: x.weight" in message
    assert "1 misshapen: down.weight (16, 8) for (8, 16)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in view.model.state_dict().items())


def test_long_lists_are_cut(view):
    with pytest.raises(ValueError, match="5 missing: q.weight, k.weight, v.weight and 2 more"):
        Masks({}).check(view)


def test_masks_of_layers_kept_dense_are_left_out(view, masks, caplog):
    extended = Masks({**masks, "head.weight": torch.ones(3, 8, dtype=torch.bool)})
    assert list(extended.resolve(view)) == list(masks)
    assert not caplog.records
    Masks({**masks, "head.weight": torch.zeros(3, 8, dtype=torch.bool)}).check(view)
    assert "head.weight" in caplog.text


def test_a_tied_mask_is_found_under_another_of_its_names(view, masks, tmp_path):
    masks.save(tmp_path / "masks.safetensors")
    other = Attention()
    del other.up, other.q, other.k, other.v
    renamed = view_of(other, keep_dense=["head"])
    loaded = Masks.load(tmp_path / "masks.safetensors")
    kept = Masks({name: loaded[name] for name in ("up.weight", "down.weight")}, aliases=loaded.aliases)
    assert set(kept.resolve(renamed)) == {"again.weight", "down.weight"}


def test_only_bool_tensors_are_masks():
    with pytest.raises(ValueError, match="'a' must be a bool tensor"):
        Masks({"a": torch.ones(2, 2)})


def test_apply_zeroes_in_place_under_all_names(view, masks):
    before = {name: weight.parameter.clone() for name, weight in view.weights.items()}
    parameters = {name: weight.parameter for name, weight in view.weights.items()}
    masks.apply(view)
    for name, mask in masks.items():
        assert view.weights[name].parameter is parameters[name]
        assert torch.equal(parameters[name], before[name] * mask)
    assert torch.equal(view.model.again.weight, view.model.up.weight)


def test_masks_of_conv1d_have_its_own_layout():
    view = view_of(nn.ModuleDict({"c": Conv1D(3, 5)}))
    Masks({"c.weight": torch.zeros(5, 3, dtype=torch.bool)}).apply(view)
    assert view.model["c"].weight.count_nonzero() == 0
    with pytest.raises(ValueError, match="misshapen"):
        Masks({"c.weight": torch.zeros(3, 5, dtype=torch.bool)}).check(view)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    ],
)
def test_held_weights_stay_zero_and_the_others_move_as_with_masking_on_the_fly(view, masks, make):
    torch.manual_seed(0)
    reference = Attention()
    reference.load_state_dict(view.model.state_dict())
    optimizer, other = make(view.model.parameters()), make(reference.parameters())
    hold = masks.hold(view, optimizer)
    masks.apply(view_of(reference, keep_dense=["head"]))
    for _ in range(5):
        batch = torch.randn(4, 8)
        for model, opt in ((view.model, optimizer), (reference, other)):
            opt.zero_grad()
            model(batch).square().mean().backward()
        hold.before_step()
        optimizer.step()
        other.step()
        masks.apply(view_of(reference, keep_dense=["head"]))
    assert hold.verify() == 0
    for name, mask in masks.items():
        assert view.weights[name].parameter[~mask].count_nonzero() == 0
    if isinstance(optimizer, torch.optim.AdamW):  # gradients of pruned weights never reach the others
        for mine, theirs in zip(view.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_an_inf_in_a_pruned_gradient_does_not_become_nan(view, masks):
    optimizer = torch.optim.AdamW(view.model.parameters(), lr=0.1)
    hold = masks.hold(view, optimizer)
    for name, mask in masks.items():
        view.weights[name].parameter.grad = torch.where(mask, 1.0, float("inf"))
    hold.before_step()
    for name, mask in masks.items():
        assert torch.equal(view.weights[name].parameter.grad, mask.float())
    nn.utils.clip_grad_norm_(view.model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    assert hold.verify() == 0
    assert all(parameter.isfinite().all() for parameter in view.model.parameters())


def test_verify_counts_and_mends_what_moved(view, masks, caplog):
    optimizer = torch.optim.SGD(view.model.parameters(), lr=0.1, momentum=0.9)
    hold = masks.hold(view, optimizer)
    view.model(torch.randn(4, 8)).sum().backward()
    optimizer.step()  # without before_step: pruned weights move, and have momentum
    moved = sum(int((view.weights[name].parameter[~mask] != 0).sum()) for name, mask in masks.items())
    assert hold.verify() == moved > 0
    assert f"{moved} pruned weights" in caplog.text
    assert hold.verify() == 0
    optimizer.zero_grad()
    view.model(torch.randn(4, 8)).sum().backward()
    hold.before_step()
    optimizer.step()
    assert hold.verify() == 0


def test_applied_is_undone(view, masks):
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    with pytest.raises(RuntimeError), masks.applied(view):
        assert all(view.weights[name].parameter[~mask].count_nonzero() == 0 for name, mask in masks.items())
        raise RuntimeError
    assert all(torch.equal(before[name], tensor) for name, tensor in view.model.state_dict().items())


def test_applied_is_undone_to_the_bit_where_weights_share_memory(view, masks):
    """Two parameters on one storage, which no mask can tell from two weights; and a NaN with a payload."""
    model = view.model
    model.k.weight = nn.Parameter(model.q.weight.data)
    model.v.weight.data.view(torch.int32)[0, :] = 0x7FC01234
    shared = view_of(model, keep_dense=["head"])
    before = {name: tensor.view(torch.int32).clone() for name, tensor in model.state_dict().items()}
    addresses = {name: weight.parameter.data_ptr() for name, weight in shared.weights.items()}
    updated = {"q.weight": torch.full((8, 8), 2.0), "up.weight": torch.full((16, 8), 3.0)}
    carried = Masks(dict(masks), aliases=masks.aliases, weights=updated)
    with carried.applied(shared):
        assert torch.equal(model.again.weight, 3.0 * masks["up.weight"]) and model.again.weight is model.up.weight
        assert model.v.weight[~masks["v.weight"]].count_nonzero() == 0
    assert all(torch.equal(before[name], tensor.view(torch.int32)) for name, tensor in model.state_dict().items())
    assert addresses == {name: weight.parameter.data_ptr() for name, weight in shared.weights.items()}


def test_masks_are_packed_and_come_out_as_they_went_in(view, masks):
    given = {name: mask for name, mask in random_masks(view, seed=3).items()}
    streamed = Masks((name, mask) for name, mask in given.items())
    assert equal(streamed, given) and streamed.digest() == Masks(given).digest()
    assert sum(bits.packed.nbytes for bits in streamed._bits.values()) * 8 == streamed.total
    assert streamed.kept == sum(int(mask.sum()) for mask in given.values())
    streamed["q.weight"].logical_not_()  # what is asked for is in memory of its own
    assert torch.equal(streamed["q.weight"], given["q.weight"])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 1), (2, 8), (0, 4)])
def test_packed_masks_of_any_size(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    masks = Masks({"a": mask})
    assert torch.equal(masks["a"], mask) and masks["a"].shape == mask.shape
    assert (masks.kept, masks.total) == (int(mask.sum()), mask.numel())


def test_report_counts_and_warns(view, masks):
    report = masks.report(view)
    assert report.overall.kept == masks.kept and report.overall.total == masks.total == view.numel
    assert report.groups["mlp"].total == 256
    assert report.groups["mlp"].kept == int(masks["up.weight"].sum() + masks["down.weight"].sum())
    assert report.warnings == []
    collapsed = {name: torch.ones_like(mask) for name, mask in masks.items()}
    collapsed["up.weight"] = torch.zeros_like(collapsed["up.weight"])
    (warning,) = Masks(collapsed).report(view).warnings
    assert warning == "layer up.weight has collapsed: 0 of 128 weights are left"
    collapsed["down.weight"] = torch.zeros_like(collapsed["down.weight"])
    assert Masks(collapsed).report(view).warnings[0].startswith("group mlp has collapsed: 0 of 256")


def test_model_digest_depends_on_prunable_weights_only():
    model = layers((3, 4), (4, 3))
    digest = model_digest(view_of(model))
    assert digest == model_digest(view_of(layers((3, 4), (4, 3))))
    dense = view_of(model, keep_dense=["b"])
    before = model_digest(dense)
    model["b"].weight.data.zero_()
    assert model_digest(dense) == before
    model["a"].weight.data[0, 0] += 1e-6
    assert model_digest(dense) != before
    assert model_digest(view_of(model.to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.5, -0.0, float("inf"), float("nan")])
def test_pruned_gradients_become_zero_whatever_they_are(view, masks, dtype, value):
    model = view.model.to(dtype)
    hold = masks.hold(view, torch.optim.SGD(model.parameters(), lr=0.1))
    for number, (name, mask) in enumerate(masks.items()):
        gradient = torch.where(mask, 2.5, value).to(dtype)
        turned = gradient.t().contiguous().t() if number % 2 else gradient  # strides of its own
        view.weights[name].parameter.grad = turned
    hold.before_step()
    for name, mask in masks.items():
        gradient = view.weights[name].parameter.grad
        assert torch.equal(gradient, mask.to(dtype) * 2.5) and not gradient.signbit().any()
