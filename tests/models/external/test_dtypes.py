"""In which types models compute and are written, and weights in several files."""

import json

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pack
import pruners
from engine.export import save_model
from models.checkpoint import find_weights, read_weights
from models.external import model as external
from models.external.preprocessing import TimmImages
from sparsity.errors import MissingFileError, UserError
from tests import tiny_models

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model in bfloat16, in several files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sharded"
    tiny_models.clip().to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def kinds(folder):
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_what_was_in_shards_is_written_in_shards_of_its_own_type(tmp_path, sharded, dtype):
    model, halves = external.load(f"hf:{sharded}", dtype=dtype)
    expected = {"auto": torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    view = external.prunable_view(model, halves=halves)
    save_model(model, tmp_path / "out", view.halves)
    assert kinds(tmp_path / "out") == {"BF16"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(sharded.glob("*.safetensors")))
    if dtype != "float16":  # which holds fewer exponents
        again = transformers.CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
        dense = transformers.CLIPModel.from_pretrained(sharded, dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in dense.items())


def test_a_model_narrowed_for_the_run_is_written_as_it_was(tmp_path):
    folder = tiny_models.save(tiny_models.clip(), tmp_path / "dense")
    model, halves = external.load(f"hf:{folder}", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    save_model(model, tmp_path / "out", halves)
    assert kinds(tmp_path / "out") == {"F32"} and model.dtype == torch.bfloat16


def test_types_that_differ_compute_in_the_widest(tmp_path):
    folder = tiny_models.save(tiny_models.clip().bfloat16(), tmp_path / "dense")
    state = load_file(folder / "model.safetensors")
    mixed = {name: tensor.float() if "layer_norm" in name else tensor for name, tensor in state.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    assert external.build(f"hf:{folder}", dtype="auto").dtype == torch.float32
    half = {name: tensor.half() if "layer_norm" in name else tensor for name, tensor in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    assert external.build(f"hf:{folder}", dtype="auto").dtype == torch.float32, "neither half type holds the other"


def test_frequencies_of_rotary_positions_keep_their_bits(tmp_path):
    folder = tiny_models.save(tiny_models.llava().bfloat16(), tmp_path / "dense")
    exact = dict(external.build(f"hf:{folder}").named_buffers())
    for weights in ("published", folder):
        model = external.build(f"hf:{folder}", weights, dtype="auto")
        assert model.dtype == torch.bfloat16
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, exact[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_batches_go_into_a_model_of_half_precision(dtype):
    torch.manual_seed(0)
    model, halves = external.load("timm:test_vit", "random", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert set(halves.values()) == {torch.float32}, "it was made in float32"
    view = external.prunable_view(model)
    batches = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
    for name in ("wanda", "snip"):
        ((_, masks),) = pruners.build(name).prune(view, batches, [0.5])
        assert masks.total - masks.kept == masks.total // 2


def test_shards_are_one_file(tmp_path, sharded):
    whole = transformers.CLIPModel.from_pretrained(sharded, dtype=torch.bfloat16).state_dict()
    for source in (sharded, sharded / "model.safetensors.index.json", find_weights(sharded)):
        found = read_weights(source)
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    pack.main([str(sharded), str(tmp_path / "one.safetensors"), "--unpack"])
    assert {n: t.tolist() for n, t in load_file(tmp_path / "one.safetensors").items()} == {
        n: t.tolist() for n, t in whole.items()
    }
    model, _ = external.load(f"hf:{sharded}", sharded, dtype="auto")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_an_index_that_says_nothing_is_refused(tmp_path, sharded):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text((sharded / index.name).read_text())
    with pytest.raises(MissingFileError, match=r"index.json: \d of \d shards are not there: model-00001-of-"):
        read_weights(tmp_path)
    for content in ("{", "[]", json.dumps({"weight_map": ["a"]})):
        index.write_text(content)
        with pytest.raises(UserError, match="index.json: no index of shards"):
            read_weights(index)


def test_weights_that_are_nowhere_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    view = external.prunable_view(model)
    with pytest.raises(UserError, match="weights of layers '0.weight', '1.weight' are on the meta device"):
        list(pruners.build("omp").prune(view, None, [0.5]))


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 64), ("test_convnext", 96), ("swin_tiny_patch4_window7_224", 112)]
)
def test_images_have_the_size_that_the_model_was_built_for(name, size):
    model = external.build(f"timm:{name}", "random", image_size=size)
    from PIL import Image

    (pixels,) = TimmImages(model)([Image.new("RGB", (300, 200))], None, None)
    assert pixels.shape == (1, 3, size, size)
    model(pixels)


def test_arguments_of_a_model_of_timm():
    model = external.build("timm:vit_tiny_patch16_224", "random", options={"depth": 1, "img_size": 48})
    assert len(model.blocks) == 1 and model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert timm.create_model("vit_tiny_patch16_224").pretrained_cfg["input_size"] == (3, 224, 224), "others keep theirs"
    with pytest.raises(UserError, match="--img_size and --model_kwargs are for models of timm"):
        external.build("hf:none", image_size=32)
