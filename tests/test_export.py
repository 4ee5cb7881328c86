"""export.py: what it writes is loaded and run by programs that do not know this project."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import export
import prune
from models.checkpoint import read_weights
from models.external import model as external
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests import tiny_models
from tests.foreign import RUN_ONNX, expected, foreign, recorded

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the parts of models that are written as ONNX in the test."""
    return recorded(monkeypatch)


@pytest.fixture
def exported(tmp_path: Path, graphs: list):
    """Prune a model, export it, and return the folder; what was exported is run again by onnxruntime elsewhere."""

    def run(model: str, *options: str, pruning: tuple[str, ...] = ("-p", "omp", "-s", "90"), onnx: bool = True) -> Path:
        prune.main(["-m", model, *pruning, "--accelerator", "cpu", "--output_dir", str(tmp_path), *options])
        (mask,) = tmp_path.glob("*/*_pruning_masks.safetensors")
        formats = "dense,packed,onnx" if onnx else "dense,packed"
        export.main(["-m", model, "--mask", str(mask), "--formats", formats, "-o", str(tmp_path / "out"), *options])
        if onnx:
            names = expected(tmp_path, graphs)
            foreign(RUN_ONNX, tmp_path, *(tmp_path / "out" / "onnx" / f"{name}.onnx" for name in names))
        return tmp_path / "out"

    return run


def test_vit_mini_loads_in_transformers(exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = exported("dino")
    told = capsys.readouterr().out
    assert "90.00 % of the prunable weights are zero" in told and "bundled" in told
    body = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
assert AutoImageProcessor.from_pretrained(sys.argv[1]).size["height"] == 72
given = load_file(sys.argv[2])
with torch.no_grad():
    error = (model(given["image"]).logits - given["out.logits"]).abs().max()
assert error < 1e-4, error
matrices = [p for p in model.parameters() if p.ndim == 2]
assert sum(int((p == 0).sum()) for p in matrices) > 0.8 * sum(p.numel() for p in matrices)
"""
    foreign(body, out / "dense", tmp_path / "classifier.safetensors")
    assert "sparsity" in (out / "dense" / "README.md").read_text()
    state = read_weights(out / "model.packed.safetensors")
    dense = load_file(out / "dense" / "model.safetensors")
    assert state.keys() == dense.keys() and all(torch.equal(state[name], dense[name]) for name in dense)
    share = float(re.search(r"(\S+) of the \S+ MB of the prunable weights", told)[1])
    assert share < 0.1 + 1 / 32 + 0.001  # float32: a tenth of the values, and a bit for each weight


# The dense folder of a tower pair, read by the models of transformers and timm that have the same layers: sizes are
# those of config.json. `near` compares with what the model itself gave for the inputs of a part.
TOWERS = """
import functools, timm, transformers
from torch.nn.functional import linear, normalize
sizes, state = json.loads(Path(sys.argv[1], "config.json").read_text()), load_file(sys.argv[1] + "/model.safetensors")
vision, text = sizes["vision"], sizes["text"]
given = {{part: load_file(f"{{sys.argv[2]}}/{{part}}.safetensors") for part in ("vision", "text", "match")}}

def under(prefix, **names):
    found = {{key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}}
    return {{names.get(key, key): value for key, value in found.items() if "position_ids" not in key}}

def bert(prefix, first, last, crossed):
    "Layers of BERT with the weights under a prefix."
    config = transformers.BertConfig(
        vocab_size=text["vocab_size"], hidden_size=text["width"], num_hidden_layers=last - first,
        num_attention_heads=text["heads"], intermediate_size=text["mlp_width"], layer_norm_eps=text["eps"],
        max_position_embeddings=text["max_positions"], is_decoder=crossed, add_cross_attention=crossed,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    own = under(prefix)
    own.setdefault("embeddings.token_type_embeddings.weight", torch.zeros(2, text["width"]))
    for key in [key for key in own if key.startswith("encoder.layer.")]:
        number, _, rest = key.removeprefix("encoder.layer.").partition(".")
        value = own.pop(key)
        if first <= int(number) < last:
            own[f"encoder.layer.{{int(number) - first}}.{{rest}}"] = value
    missing = set(model.state_dict()) - set(own)
    assert not {{key for key in missing if "position_ids" not in key and "token_type_ids" not in key}}, missing
    model.load_state_dict(own, strict=False)
    model.config.is_decoder = False
    for module in model.modules():
        module.is_causal = False
    return model

def near(found, part, output):
    error = (found - given[part]["out." + output]).abs().max()
    assert error < 1e-4, (part, output, error)

def projected(states, name):
    return normalize(linear(states[:, 0], state[name + ".weight"], state[name + ".bias"]), dim=-1)

with torch.no_grad():
    {body}
"""
XVLM = """
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=vision["width"], intermediate_size=vision["mlp_width"], num_hidden_layers=vision["layers"],
        num_attention_heads=vision["heads"], image_size=vision["image_size"], patch_size=vision["patch_size"],
        layer_norm_eps=vision["eps"],
    )).eval()
    own = under("vision_encoder.", class_embedding="embeddings.class_embedding", **{
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "pos_embed.weight": "embeddings.position_embedding.weight",
    })
    clip.load_state_dict(own)
    tokens = clip.post_layernorm(clip(given["vision"]["image"]).last_hidden_state)
    near(tokens, "vision", "tokens")
    near(projected(tokens, "vision_proj"), "vision", "feature")
    tower = bert("text_encoder.bert.", 0, text["fusion_layer"], False)
    states = tower(given["text"]["ids"], given["text"]["atts"]).last_hidden_state
    near(states, "text", "states")
    near(projected(states, "text_proj"), "text", "feature")
    fusion = bert("text_encoder.bert.", text["fusion_layer"], text["layers"], True)
    pairs = given["match"]  # all tokens of the texts are real
    fused = fusion.encoder(pairs["states"], encoder_hidden_states=pairs["tokens"]).last_hidden_state[:, 0]
    width = len(state["itm_head.1.weight"])
    hidden = linear(fused, state["itm_head.0.weight"], state["itm_head.0.bias"])
    hidden = torch.layer_norm(hidden, (width,), state["itm_head.1.weight"], state["itm_head.1.bias"])
    hidden = torch.nn.functional.gelu(hidden)
    near(linear(hidden, state["itm_head.3.weight"], state["itm_head.3.bias"]), "match", "logits")
"""
BLIP = """
    vit = timm.models.VisionTransformer(
        img_size=vision["image_size"], patch_size=vision["patch_size"], embed_dim=vision["width"],
        depth=vision["layers"], num_heads=vision["heads"], mlp_ratio=vision["mlp_ratio"], num_classes=0,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()
    vit.load_state_dict(under("visual_encoder."))
    tokens = vit.forward_features(given["vision"]["image"])
    near(tokens, "vision", "tokens")
    near(projected(tokens, "vision_proj"), "vision", "feature")
    reader = bert("text_encoder.", 0, text["layers"], True)
    states = reader(given["text"]["ids"], given["text"]["atts"]).last_hidden_state
    near(projected(states, "text_proj"), "text", "feature")
    pairs = given["match"]
    fused = reader(pairs["states"], pairs["atts"], encoder_hidden_states=pairs["tokens"]).last_hidden_state[:, 0]
    near(linear(fused, state["itm_head.weight"], state["itm_head.bias"]), "match", "logits")
"""


@pytest.mark.parametrize(("model", "body"), [("xvlm", XVLM), pytest.param("blip", BLIP, marks=pytest.mark.slow)])
def test_towers_of_the_bundled_models(exported, tmp_path: Path, model: str, body: str) -> None:
    out = exported(model, pruning=("-p", "omp", "--pattern", "2:4"))
    names = {path.name for path in (out / "onnx").iterdir()}
    assert names == {"vision.onnx", "text.onnx", "match.onnx", "tensorrt.txt"}
    lines = (out / "onnx" / "tensorrt.txt").read_text()
    assert "--sparsity=enable" in lines and "plugin" in lines and "--minShapes=image:1x3x" in lines
    foreign(TOWERS.format(body=body.strip()), out / "dense", tmp_path)


BASE = ("timm:vit_base_patch16_224", "--weights", "random")


@pytest.mark.parametrize("model", [("tests.tiny_models:pruned_timm",), pytest.param(BASE, marks=pytest.mark.slow)])
def test_a_timm_model_loads_in_timm(exported, tmp_path: Path, model: tuple[str, ...]) -> None:
    out = exported(*model)
    body = """
import timm
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
given = load_file(sys.argv[2])
with torch.no_grad():
    error = (model(given["image"]) - given["out.logits"]).abs().max()
assert error < 1e-4, error
"""
    foreign(body, out / "dense", tmp_path / "classifier.safetensors")


def processor(kind: str):
    images, words = tiny_models.image_processor(), tiny_models.tokenizer()
    if kind == "clip":
        return transformers.CLIPProcessor(images, words)
    return transformers.LlavaProcessor(images, words, patch_size=8, vision_feature_select_strategy="default")


# What the parts give together is what the whole model gives.
WHOLE = {
    "clip": """
import numpy, onnxruntime
given = {name: tensor.numpy() for name, tensor in load_file(sys.argv[2]).items()}
def run(part, *names):
    session = onnxruntime.InferenceSession(f"{sys.argv[4]}/{part}.onnx")
    found, = session.run(None, {name: given[name] for name in names})
    return found / numpy.linalg.norm(found, axis=-1, keepdims=True)
scores = run("vision", "pixel_values") @ run("text", "input_ids", "attention_mask").T
scale = given["out"] / scores  # the temperature, which is no part
assert numpy.ptp(scale) < 1e-4 * scale.mean()
""",
    "llava": """
import numpy, onnxruntime
given = {name: tensor.numpy() for name, tensor in load_file(sys.argv[2]).items()}
def run(part, **inputs):
    return onnxruntime.InferenceSession(f"{sys.argv[4]}/{part}.onnx").run(None, inputs)[0]
tokens, embeddings = run("vision", pixel_values=given["pixel_values"]), run("embed", input_ids=given["input_ids"])
embeddings[given["input_ids"] == 98] = tokens.reshape(-1, tokens.shape[-1])
logits = run("step", inputs_embeds=embeddings, attention_mask=given["attention_mask"])
real = given["attention_mask"] == 1
error = numpy.abs(logits[real] - given["out"][real]).max()
assert error < 1e-4, error
""",
}


@pytest.mark.parametrize(("kind", "output"), [("clip", "logits_per_image"), ("llava", "logits")])
def test_models_of_transformers_load_there(exported, tmp_path: Path, kind: str, output: str) -> None:
    torch.manual_seed(0)
    source = tiny_models.save(tiny_models.TRANSFORMERS[kind](), tmp_path / "source", processor(kind))
    out = exported(f"hf:{source}", pruning=("-p", "omp", "-s", "90"))
    model = external.build(f"hf:{source}")
    (mask,) = tmp_path.glob("*/*_pruning_masks.safetensors")
    Masks.load(mask).apply(external.prunable_view(model))
    batch = {name: value for name, value in tiny_models.batch_for(kind).items() if isinstance(value, torch.Tensor)}
    batch.pop("labels", None)
    with torch.no_grad():
        found = model(**batch)[output]
    save_file({**batch, "out": found.contiguous()}, tmp_path / "whole.safetensors")
    body = """
import transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
model = getattr(transformers, config.architectures[0]).from_pretrained(sys.argv[1]).eval()
assert transformers.AutoProcessor.from_pretrained(sys.argv[1]).tokenizer("a red cat")["input_ids"]
given = load_file(sys.argv[2])
expected = given.pop("out")
with torch.no_grad():
    error = (model(**given)[sys.argv[3]] - expected).abs().max()
assert error < 1e-4, error
assert sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2) > 10000
"""
    foreign(body + WHOLE[kind], out / "dense", tmp_path / "whole.safetensors", output, out / "onnx")


def test_learned_masks_become_zeros(tmp_path: Path) -> None:
    state = load_file("data/vit_mini.safetensors")
    name = "vit.encoder.layer.0.intermediate.dense"
    gate = torch.randn(state[f"{name}.weight"].numel() // 4, 6)
    torch.save({"state_dict": {**state, f"{name}.gate": gate}}, tmp_path / "learned.pth.tar")
    save_file({**state, f"{name}.gate": gate}, tmp_path / "learned.safetensors")
    for file in ("learned.safetensors", "learned.pth.tar"):
        out = tmp_path / f"out_{file}"
        arguments = ["-m", "dino", "--variant", "mini", "--weights", str(tmp_path / file), "--formats", "dense"]
        export.main([*arguments, "-o", str(out)])
        weight = load_file(out / "dense" / "model.safetensors")[f"{name}.weight"]
        assert weight.unflatten(1, (-1, 4)).count_nonzero(-1).max() == 2


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the weights have no zeros: give --mask"):
        export.main(["-m", "dino", "--formats", "packed", "-o", str(tmp_path)])
    with pytest.raises(UserError, match="there is no such file"):
        export.main(["-m", "dino", "--mask", str(tmp_path / "none.safetensors"), "-o", str(tmp_path)])
    with pytest.raises(UserError, match="--task is for models of this project"):
        export.main(["-m", "hf:folder", "--task", "captioning", "-o", str(tmp_path)])
    with pytest.raises(SystemExit):
        export.main(["-m", "dino", "--formats", "tensorrt"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="--formats onnx,int8 needs packages .*: pip install onnxscript"):
        export.main(["-m", "dino", "-o", str(tmp_path)])
