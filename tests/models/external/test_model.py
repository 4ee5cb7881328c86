"""Models of timm, transformers and neither: what is prunable, exactly how much, and that the rest stays as it was."""

import copy

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import pruners
from models.external import model as external
from sparsity.pattern import parse_pattern
from sparsity.run.request import Request
from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.inputs import Statistics
from sparsity.statistics.reading import CalibrationPass
from tests import tiny_models
from tests.tiny_models import TEXT, TIMM, TRANSFORMERS, VISION, batch_for, make_timm, side, words

pytestmark = pytest.mark.script

PATTERN = parse_pattern("2:4")


def linear_names(model):
    """Return the names of what a reader of the model would call its linear layers."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def check_half(view, masks, pools):
    for names in pools:
        assert sum(int((~masks[n]).sum()) for n in names) == sum(view.weights[n].numel for n in names) // 2


def check_pattern(view, masks):
    for name, weight in view.weights.items():
        kept = masks[name].t() if weight.transposed else masks[name]
        if kept.shape[1] % 4:
            assert kept.all()
        else:
            assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def check_applied(view, masks, before, reload):
    """Zeros where the masks say, nothing else moved, and the state dict loads into a plain model."""
    with masks.applied(view):
        state = view.model.state_dict()
        assert list(state) == list(before)
        pruned = {alias: masks[w.name] for w in view.weights.values() for alias in w.aliases}
        assert all(torch.equal(t, before[key] * pruned.get(key, 1)) for key, t in state.items())
        again = reload().state_dict()
        assert all(torch.equal(again[key], t) for key, t in state.items())


def prune_and_check(view, batches, reload):
    """Half of the weights, and 2:4, by three pruners."""
    before = {name: t.clone() for name, t in view.model.state_dict().items()}
    for name in ("omp", "lamp", "multiflow"):
        pruner = pruners.build(name)
        statistics = pruner.measure(view, CalibrationPass(batches))
        ((_, masks),) = pruner.masks(view, statistics, Request([0.5]))
        check_half(view, masks, view.groups.values() if name == "multiflow" else [list(view.weights)])
        check_applied(view, masks, before, reload)
        ((_, masks),) = pruner.masks(view, statistics, Request(pattern=PATTERN))
        check_pattern(view, masks)
        check_applied(view, masks, before, reload)
    assert all(torch.equal(t, before[name]) for name, t in view.model.state_dict().items())


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_vision_language_models_of_transformers(tmp_path, kind):
    torch.manual_seed(0)
    folder = tiny_models.save(TRANSFORMERS[kind](), tmp_path / kind)
    model = external.build(f"hf:{folder}")
    view = external.prunable_view(model)
    assert set(view.groups) == {
        "clip": {"vision", "text"},
        "siglip": {"vision", "text"},
        "blip2": {"vision", "fusion", "projector", "text"},
        "whisper": {"audio", "text"},
    }.get(kind, {"vision", "projector", "text"})
    dense = {name for name in linear_names(model) if f"{name}.weight" not in view.weights}
    assert dense == {
        "clip": {"visual_projection", "text_projection"},
        "siglip": {"text_model.head", "vision_model.head.attention.out_proj"},
        "blip2": {"language_model.lm_head"},
        "llava": {"lm_head"},
        "paligemma": {
            "lm_head",
            "model.vision_tower.head.attention.out_proj",
            "model.vision_tower.head.mlp.fc1",
            "model.vision_tower.head.mlp.fc2",
        },
        "whisper": {"proj_out"},
    }.get(kind, {"lm_head"})

    def reload():
        model.save_pretrained(tmp_path / "pruned")
        return type(model).from_pretrained(tmp_path / "pruned")

    prune_and_check(view, [batch_for(kind, seed) for seed in range(2)], reload)


@pytest.mark.parametrize("kind", TIMM)
def test_vision_models_of_timm(tmp_path, kind):
    torch.manual_seed(0)
    model = make_timm(kind).eval()
    view = external.prunable_view(model)
    head = model.default_cfg["classifier"]
    dense = {name for name in linear_names(model) if f"{name}.weight" not in view.weights}
    assert dense == (set(head) if kind == "deit" else {head})
    assert set(view.groups) == {"vision"}

    def reload():
        save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "pruned.safetensors")
        name, options = TIMM[kind]
        return timm.create_model(name, checkpoint_path=str(tmp_path / "pruned.safetensors"), **options)

    images = torch.randn(2, 3, side(kind), side(kind), generator=torch.Generator().manual_seed(1))
    prune_and_check(view, [images], reload)


# What is prunable


def test_conv1d_of_transformers_with_tied_embeddings():
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    view = external.prunable_view(model)
    layers = [
        f"transformer.h.{i}.{n}.weight"
        for i in (0, 1)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert list(view.weights) == layers, "the head is tied to the embedding"
    assert {weight.group for weight in view.weights.values()} == {"text"}
    assert view.weights[layers[0]].shape == (96, 32) and view.weights[layers[0]].transposed
    texts = words([[1, 5, 6, 7, 2], [1, 9, 2]])
    prune_and_check(view, [texts], lambda: copy.deepcopy(model))
    ((_, masks),) = pruners.build("snip").prune(view, [{**texts, "labels": texts["input_ids"]}], [0.5])
    check_half(view, masks, [list(view.weights)])


def test_include_and_exclude():
    torch.manual_seed(0)
    model = tiny_models.clip()
    mlp = [name for name in external.prunable_view(model).weights if ".mlp." in name]

    def names(**options):
        return list(external.prunable_view(model, **options).weights)

    assert names(include=["*.mlp"]) == names(include=["*.mlp.*"]) == mlp
    assert names(include=["*.mlp"], exclude=["vision_model"]) == [n for n in mlp if n.startswith("text_model.")]
    assert names(exclude=["*.self_attn", "*.fc2"]) == [n for n in mlp if n.endswith("fc1.weight")]
    assert names(include=["*.fc1", "visual_projection"]) == names(include=["*.fc1"]), "a head stays dense"
    for option in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=f"--{option}: no layer .* matches 'vision'; its names begin with .*vision_m"
        ):
            names(**{option: ["vision"]})


def test_groups_of_ones_own():
    model = tiny_models.clip()
    groups = {"attention": ["*.self_attn.*"], "text": ["text_model.*"]}
    view = external.prunable_view(model, groups=groups)
    assert {"attention", "text", "other"} == set(view.groups)
    assert all("self_attn" in name for name in view.groups["attention"])
    assert all(name.startswith("text_model.") and ".mlp." in name for name in view.groups["text"])
    assert all(name.startswith("vision_model.") and ".mlp." in name for name in view.groups["other"])
    with pytest.raises(ValueError, match="--groups: no layer of the model matches 'tex'"):
        external.prunable_view(model, groups={"text": ["tex"]})


@pytest.mark.parametrize(
    "kind", [transformers.LlavaForConditionalGeneration, transformers.Blip2ForConditionalGeneration]
)
def test_towers_by_name(kind):
    view = external.prunable_view(tiny_models.llava() if "Llava" in kind.__name__ else tiny_models.blip2())
    known = {"qformer": "fusion", "multi_modal_projector": "projector", "language_projection": "projector"}
    known |= {"language_model": "text", "vision": "vision"}
    for name, weight in view.weights.items():
        assert weight.group == next(group for part, group in known.items() if part in name), name


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 4), nn.Parameter(torch.zeros(4, 8, 8))


def test_what_cannot_be_pruned_is_refused_by_name_with_a_way_out():
    model = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2, kdim=4), "experts": Experts()}
    )
    with pytest.raises(
        ValueError, match="'attention' cannot be pruned: .*nn.MultiheadAttention.* --exclude 'attention'"
    ):
        external.prunable_view(model)
    with pytest.raises(
        ValueError, match=r"'experts' cannot be pruned: its up is 3-D, \(4, 8, 8\).*--exclude 'experts'"
    ):
        external.prunable_view(model, exclude=["attention"])
    assert list(external.prunable_view(model, exclude=["attention", "experts"]).weights) == ["a.weight"]
    assert list(external.prunable_view(model, include=["a"]).weights) == ["a.weight"]


def test_a_fused_projection_is_one_layer():
    view = external.prunable_view(make_timm("vit"))
    assert view.weights["blocks.0.attn.qkv.weight"].shape == (96, 32)


# Calibration passes


def naive_norms(model, batches, real):
    """Name of each linear layer -> the sum of squares of its inputs, where `real(name, batch)` says so."""
    sums, batch = {}, None

    def observe(name, args):
        rows = args[0].detach().double()
        keep = real(name, batch)
        rows = rows.reshape(-1, rows.shape[-1]) if keep is None else rows[keep]
        sums[name] = sums.get(name, 0) + rows.square().sum(0)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("kind", ["clip", "llava", "qwen"])
def test_padding_counts_in_no_text_layer(kind):
    torch.manual_seed(0)
    model = TRANSFORMERS[kind]().eval()
    view = external.prunable_view(model)
    batches = [batch_for(kind, seed) for seed in range(2)]

    def real(name, batch):
        text = name.startswith(("text_model.", "model.language_model."))
        return batch["attention_mask"].bool() if text else None

    expected = naive_norms(model, batches, real)
    with Statistics(view, "input_norms") as statistics:
        for batch in batches:
            statistics.add(batch)
    for name, value in statistics.result().items():
        torch.testing.assert_close(value, expected[name.removesuffix(".weight")], rtol=1e-12, atol=0, msg=name)


def test_pooled_and_cross_attention_inputs_are_not_padded():
    config = transformers.BertConfig(**TEXT)
    view = external.prunable_view(transformers.BertModel(config).eval())
    batch = words([[1, 5, 6, 7, 2], [1, 9, 2]])
    assert view.valid_tokens("pooler.dense.weight", batch) is None
    assert torch.equal(view.valid_tokens("encoder.layer.0.output.dense.weight", batch), batch["attention_mask"].bool())
    assert view.valid_tokens("encoder.layer.0.output.dense.weight", batch["input_ids"]) is None
    with Statistics(view, "input_norms") as statistics:
        statistics.add(batch)
    assert len(statistics.result()) == len(view.weights)

    text = {**TEXT, "encoder_hidden_size": 32, "is_decoder": True}
    blip = transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=VISION))
    view = external.prunable_view(blip)
    layer = "text_decoder.bert.encoder.layer.0."
    assert view.valid_tokens(f"{layer}crossattention.self.key.weight", batch) is None
    assert view.valid_tokens(f"{layer}crossattention.self.query.weight", batch) is not None
    assert not any(".cls." in name for name in view.weights)


def test_a_question_and_its_answer_have_masks_of_their_own():
    text = {**TEXT, "encoder_hidden_size": 32}
    model = transformers.BlipForQuestionAnswering(transformers.BlipConfig(text_config=text, vision_config=VISION))
    view, layer = external.prunable_view(model), "encoder.layer.0."
    batch = words([[1, 5, 6, 7, 2], [1, 9, 2]]) | {"decoder_attention_mask": torch.tensor([[1, 1], [1, 0]])}
    question, answer = batch["attention_mask"].bool(), batch["decoder_attention_mask"].bool()
    for name, expected in (
        (f"text_encoder.{layer}crossattention.self.key.weight", None),  # the image
        (f"text_encoder.{layer}crossattention.self.query.weight", question),
        (f"text_decoder.bert.{layer}crossattention.self.key.weight", question),
        (f"text_decoder.bert.{layer}attention.self.key.weight", answer),
    ):
        found = view.valid_tokens(name, batch)
        assert found is expected or torch.equal(found, expected), name


def test_what_reads_more_than_the_text_is_not_guessed():
    """ViLT's layers read text and image in one sequence."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViltConfig(**sizes, vocab_size=99, image_size=32, patch_size=16)
    model = transformers.ViltModel(config).eval()
    batch = {**words([[1, 5, 6, 7, 2], [1, 9, 2]]), "pixel_values": torch.randn(2, 3, 32, 32)}
    with (
        Statistics(external.prunable_view(model), "input_norms") as statistics,
        pytest.raises(ValueError, match="layer 'encoder.layer.0.*--groups must put it into another group than 'text'"),
    ):
        statistics.add(batch)
    with Statistics(external.prunable_view(model, groups={"both": ["*"]}), "input_norms") as statistics:
        statistics.add(batch)
    assert len(statistics.result()) == 7


def test_an_encoder_and_its_decoder_have_masks_of_their_own():
    sizes = {"vocab_size": 99, "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    view = external.prunable_view(transformers.T5ForConditionalGeneration(config).eval())
    batch = words([[1, 5, 6, 7, 2], [1, 9, 2]])
    answers = words([[5, 6], [7]])
    batch |= {"decoder_input_ids": answers["input_ids"], "decoder_attention_mask": answers["attention_mask"]}
    encoder, decoder = batch["attention_mask"].bool(), answers["attention_mask"].bool()
    for name in view.weights:
        reads_encoder = name.startswith("encoder.") or name.endswith(
            ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
        )
        assert torch.equal(view.valid_tokens(name, batch), encoder if reads_encoder else decoder), name
    with Statistics(view, "input_norms") as statistics:
        statistics.add(batch)
    assert len(statistics.result()) == len(view.weights)


class Twice(nn.Module):
    """Calls a nested model several times with tuples, dicts and keywords, and hands it no tensor first."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Scaled(4, 3)})

    def forward(self, pair, *, extra):
        first, second = pair
        seen = [self.inner["a"](input=x) for x in (first, second, extra["x"])]
        return {"loss": sum(self.inner["b"]("scale", 2, x=x).square().mean() for x in seen), "seen": seen}


class Scaled(nn.Linear):
    def forward(self, what, factor, x):
        return factor * super().forward(x)


def test_nested_calls_with_tuples_dicts_and_keywords():
    torch.manual_seed(0)
    model = Twice()
    view = external.prunable_view(model)
    x = [torch.randn(n, 4) for n in (2, 3, 5)]
    batch = {"pair": (x[0], x[1]), "extra": {"x": x[2]}}
    with Statistics(view, "input_norms") as statistics:
        statistics.add(batch)
    inputs = torch.cat(x).double()
    norms = statistics.result()
    torch.testing.assert_close(norms["inner.a.weight"], inputs.square().sum(0))
    outputs = model.inner["a"](torch.cat(x)).detach().double()
    torch.testing.assert_close(norms["inner.b.weight"], outputs.square().sum(0))
    assert statistics.samples == {"inner.a.weight": 10, "inner.b.weight": 10}
    expected = torch.autograd.grad(model(**batch)["loss"], model.inner["a"].weight)[0]
    torch.testing.assert_close(mean_gradients(view, [batch])["inner.a.weight"], expected)


class PassedOver(nn.Module):
    """Reads a layer's weight in the first batch alone, calls the layer in others and twice in one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.b(nn.functional.linear(input=x, weight=self.a.weight, bias=self.a.bias))
        return x if len(x) > 2 else self.a(self.a(x))


def test_layers_that_are_passed_over_are_observed_once():
    torch.manual_seed(0)
    model = PassedOver()
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    with Statistics(external.prunable_view(model), "input_norms") as statistics:
        for batch in (first, second):
            statistics.add(batch)
    with torch.no_grad():
        middle = model.b(model.a(second))
        inputs = torch.cat([first, second, middle, model.a(middle)]).double()
    torch.testing.assert_close(statistics.result()["a.weight"], inputs.square().sum(0))
    assert statistics.samples == {"a.weight": 9, "b.weight": 5}


@pytest.mark.parametrize("kind", ["eva_giant", "beit", "swin_v2"])
def test_fused_projections_that_no_hook_sees(kind):
    torch.manual_seed(0)
    model = make_timm(kind).eval()
    seen = {}
    name, norm = next((n, m) for n, m in model.named_modules() if n.endswith("blocks.0.norm1"))
    with Statistics(external.prunable_view(model), "input_norms") as statistics:
        handle = norm.register_forward_hook(lambda *call: seen.update({name: call[2]}))
        statistics.add(torch.randn(2, 3, side(kind), side(kind)))
        handle.remove()
    if kind != "swin_v2":  # which norms after attention
        expected = seen[name].double().flatten(0, -2).square().sum(0)
        torch.testing.assert_close(statistics.result()[name.replace("norm1", "attn.qkv.weight")], expected)


def test_positional_batches_and_those_that_do_not_fit():
    view = external.prunable_view(nn.Sequential(nn.Linear(2, 2)))
    assert view.forward((torch.ones(1, 2),)).shape == view.forward(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(ValueError, match="does not fit the model's forward: too many positional arguments"):
        view.forward((torch.ones(1, 2), torch.ones(1)))
    with pytest.raises(ValueError, match="does not fit the model's forward: missing a required argument: 'input'"):
        view.forward({"images": torch.ones(1, 2)})


# Losses


@pytest.mark.parametrize("kind", ["clip", "blip2", "qwen"])
def test_the_loss_of_transformers_models_is_their_own(kind):
    torch.manual_seed(0)
    model = TRANSFORMERS[kind]().eval()
    view, batch = external.prunable_view(model), batch_for(kind)
    assert torch.equal(view.loss(batch), model(**batch).loss)
    ((_, masks),) = pruners.build("snip").prune(view, [batch], [0.5])
    check_half(view, masks, [list(view.weights)])
    silent = {key: value for key, value in batch.items() if key not in ("labels", "return_loss")}
    with pytest.raises(ValueError, match="returns no loss .*--loss package.module:function"):
        view.loss(silent)


def test_the_loss_of_timm_models_is_cross_entropy():
    torch.manual_seed(0)
    model = make_timm("vit").eval()
    view = external.prunable_view(model)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 1])
    expected = nn.functional.cross_entropy(model(images), labels)
    torch.testing.assert_close(view.loss((images, labels)), expected)
    torch.testing.assert_close(view.forward((images, labels)), model(images))
    for batch in (images, (images,)):
        with pytest.raises(ValueError, match="from labels: .*a subfolder of images for each class"):
            view.loss(batch)
    with pytest.raises(ValueError, match="label 7 does not exist: the model has 5 classes"):
        view.loss((images, labels + 3))


def test_a_loss_of_ones_own_draws_the_same_each_time():
    torch.manual_seed(0)
    model = make_timm("vit").eval()

    def loss(model, batch):
        return (model(batch) * torch.rand(5)).sum()

    view, images = external.prunable_view(model, loss=loss), torch.randn(2, 3, 32, 32)
    state = torch.random.get_rng_state()
    first, again, other = (view.loss(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_layer_without_a_gradient_is_named():
    """LLaVA's last vision block: its output is not read."""
    torch.manual_seed(0)
    model = tiny_models.llava().eval()
    with pytest.raises(ValueError, match="vision_tower.encoder.layers.1.* got no gradient .*--exclude"):
        pruners.build("snip").measure(external.prunable_view(model), CalibrationPass([batch_for("llava")]))
    view = external.prunable_view(model, exclude=["*.vision_tower.encoder.layers.1"])
    ((_, masks),) = pruners.build("snip").prune(view, [batch_for("llava")], [0.5])
    check_half(view, masks, [list(view.weights)])


# Names and weights


def factory():
    torch.manual_seed(0)
    return make_timm("vit")


def test_a_function_that_returns_a_model(tmp_path):
    model = external.build("tests.models.external.test_model:factory")
    assert not model.training
    assert external.prunable_view(model).groups.keys() == {"vision"}
    changed = {key: t + 1 for key, t in model.state_dict().items()}
    save_file(changed, tmp_path / "w.safetensors")
    other = external.build("tests.models.external.test_model:factory", tmp_path / "w.safetensors")
    assert all(torch.equal(t, changed[key]) for key, t in other.state_dict().items())


def test_random_weights_need_nothing_downloaded(tmp_path):
    model = external.build("timm:test_vit", "random")
    assert len(external.prunable_view(model).weights) == 4 * 6
    tiny_models.clip().config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)
    assert isinstance(external.build(f"hf:{tmp_path}", "random"), transformers.CLIPModel)
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert isinstance(external.build(f"hf:{tmp_path}", "random"), transformers.CLIPModel), "the base of that type"


def test_half_precision_weights_are_pruned_in_float32(tmp_path):
    tiny_models.clip().to(torch.bfloat16).save_pretrained(tmp_path)
    model = external.build(f"hf:{tmp_path}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [
        ("timm:vit_tiny_patch16_225", "random", "did you mean timm:vit_tiny_patch16_224?"),
        ("timm:vit_tiny_patch16_224.nobody", "published", "-m timm:vit_tiny_patch16_224.nobody: "),
        (
            "timm:test_vit",
            "published",
            "the hub cannot be reached, and these weights have not been downloaded before; give -",
        ),
        (
            "hf:nobody/nothing",
            "published",
            "-m hf:nobody/nothing: no such folder, and not found on the hub or in its cache",
        ),
        ("hf:tests", "random", "-m hf:tests: cannot be read: "),
        ("timm:test_vit", "absent.pth", "--weights absent.pth: there is no such file"),
        ("no.such_module:f", "published", "-m no.such_module:f: there is no module 'no' here or in PYTHONPATH"),
        ("tests.models.external.test_model:factoy", "published", "has no function 'factoy', did you mean 'factory'?"),
        ("tests.models.external.test_model:linear_list", "published", "has no function 'linear_list'"),
        ("collections:OrderedDict", "published", "expected a function that returns an nn.Module, got OrderedDict"),
    ],
)
def test_what_is_not_to_be_had_is_said_in_one_line(monkeypatch, name, weights, told):
    for module in ("external.model", "hub"):
        monkeypatch.setattr(f"models.{module}.hub_answers", lambda: False)
    with pytest.raises((ValueError, OSError)) as caught:
        external.build(name, weights)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_configuration_without_weights(tmp_path):
    config = transformers.ViTConfig(**VISION)
    config.architectures = ["ViTModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no weights: .*model.safetensors.*; give --weights FILE or --weights random"):
        external.build(f"hf:{tmp_path}")
    assert isinstance(external.build(f"hf:{tmp_path}", "random"), transformers.ViTModel)


def test_weights_that_are_missing_in_a_checkpoint_are_named(tmp_path, caplog):
    """A base model's checkpoint, loaded for classification."""
    tiny_models.save(transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    external.build(f"hf:{tmp_path}")
    assert "has no weights for classifier.bias, classifier.weight: they are random" in caplog.text


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    config = transformers.ViTConfig(**VISION)
    config.architectures = ["VeryNewModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers has no VeryNewModel, .*trust_remote_code.* is not run"):
        external.build(f"hf:{tmp_path}")
