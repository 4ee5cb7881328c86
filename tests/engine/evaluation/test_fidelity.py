"""Fidelity to the dense model, against formulas written out, and the numbers of labelled data."""

import copy
import math
from contextlib import nullcontext

import pytest
import timm
import torch
import transformers
from torch.nn import functional as F

import pruners
from engine.evaluation.fidelity import Fidelity
from models.external import model as external
from tests import tiny_models
from tests.tiny_models import TEXT, VISION, batch_for

pytestmark = pytest.mark.script


def fidelity(model, batches):
    view = external.prunable_view(model)
    options = {"to_device": lambda batch: batch, "arithmetic": nullcontext}
    return view, Fidelity(model, external.probes(model, view), batches, **options)


def half(view):
    ((_, masks),) = pruners.build("omp").prune(view, None, [0.5])
    return masks


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5).eval()


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 3, 160, 160, generator=generator), torch.tensor([0, 3, 4])) for _ in range(2)]


def test_the_dense_model_is_faithful_to_itself(vit):
    _, measure = fidelity(vit, images())
    found = measure()
    assert found["cos %"] == pytest.approx(100, abs=1e-4) and found["pooled %"] == pytest.approx(100, abs=1e-4)
    assert found["agree %"] == 100 and found["KL mnat"] == pytest.approx(0, abs=1e-9)
    assert list(found) == measure.measures and found["eval s"] > 0


def test_a_classifier_against_the_formulas(vit):
    view, measure = fidelity(vit, images())
    dense, before = copy.deepcopy(vit), {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with half(view).applied(view), torch.no_grad():
        found = measure()
        pairs = [(dense(x).double().log_softmax(-1), vit(x).double().log_softmax(-1)) for x, _ in images()]
        pooled = [
            (
                dense.forward_head(dense.forward_features(x), pre_logits=True),
                vit.forward_head(vit.forward_features(x), pre_logits=True),
            )
            for x, _ in images()
        ]
    p, q = (torch.cat(each) for each in zip(*pairs, strict=True))
    assert found["KL mnat"] == pytest.approx(1000 * float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["agree %"] == pytest.approx(100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    labels = torch.cat([labels for _, labels in images()])
    assert found["top-1"] == pytest.approx(100 * float((q.argmax(-1) == labels).double().mean()))
    assert found["top-5"] == 100, "of 5 classes"
    a, b = (torch.cat(each) for each in zip(*pooled, strict=True))
    assert found["pooled %"] == pytest.approx(100 * float(F.cosine_similarity(a, b).mean()), rel=1e-5)
    assert found["cos %"] < 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_more_zeros_are_less_faithful(vit):
    view, measure = fidelity(vit, images())
    found = []
    for _, masks in pruners.build("omp").prune(view, None, [0.2, 0.5, 0.9]):
        with masks.applied(view):
            found.append(measure())
    assert [m["cos %"] for m in found] == sorted((m["cos %"] for m in found), reverse=True)
    assert [m["KL mnat"] for m in found] == sorted(m["KL mnat"] for m in found)


def test_two_towers_and_what_they_find_of_each_other():
    torch.manual_seed(0)
    model = tiny_models.clip().eval()
    batches = [batch_for("clip", seed) for seed in range(3)]
    for batch, words in zip(batches, (5, 6, 7), strict=True):
        batch["input_ids"][:, 1] = words
    view, measure = fidelity(model, batches)
    assert {"cos vision %", "cos text %", "pooled vision %", "pooled text %"} <= set(measure.measures)
    with half(view).applied(view), torch.no_grad():
        found = measure()
        outputs = [model(**batch) for batch in batches]
    scores = torch.cat([o.image_embeds for o in outputs]) @ torch.cat([o.text_embeds for o in outputs]).T
    for way, table in (("i2t", scores), ("t2i", scores.T)):
        rank = (table > table.diag()[:, None]).sum(1)
        for k in (1, 5):
            assert found[f"{way} R@{k}"] == pytest.approx(100 * float((rank < k).double().mean()))


def test_images_with_the_same_text_are_each_others_answers():
    torch.manual_seed(0)
    model = tiny_models.clip().eval()
    one = batch_for("clip")
    one["input_ids"], one["attention_mask"] = one["input_ids"][:1].repeat(2, 1), one["attention_mask"][:1].repeat(2, 1)
    _, measure = fidelity(model, [one])
    assert measure()["i2t R@1"] == measure()["t2i R@1"] == 100


@pytest.mark.parametrize("kind", ["llava", "llama", "t5"])
def test_perplexity_is_that_of_the_models_own_loss(kind):
    torch.manual_seed(0)
    if kind == "llava":
        model, batches = tiny_models.llava().eval(), [batch_for("llava")]
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
        words = torch.arange(3, 15).reshape(2, 6)
        batches = [{"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}]
    else:
        config = transformers.T5Config(
            vocab_size=99, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0
        )
        model, words = transformers.T5ForConditionalGeneration(config).eval(), torch.arange(3, 15).reshape(2, 6)
        batches = [{"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}]
    view, measure = fidelity(model, batches)
    with torch.no_grad():
        expected = math.exp(float(model(**batches[0]).loss))
    assert measure()["perplexity"] == pytest.approx(expected, rel=1e-4)
    with half(view).applied(view), torch.no_grad():
        assert measure()["perplexity"] == pytest.approx(math.exp(float(model(**batches[0]).loss)), rel=1e-4)


def test_padding_does_not_count():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TEXT)).eval()
    batch = tiny_models.words([[1, 5, 6, 7, 2], [1, 9, 2]])
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)}
    results = []
    for each in (batch, other):
        view, measure = fidelity(model, [each])
        with half(view).applied(view):
            results.append(measure()["cos %"])
    assert results[0] == pytest.approx(results[1], abs=1e-6) and results[0] < 99.9


def test_a_module_of_ones_own():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    view, measure = fidelity(model, [(torch.randn(5, 8),)])
    with half(view).applied(view):
        found = measure()
    assert found["cos %"] < 100 and found["KL mnat"] > 0 and "top-1" not in found
    with pytest.raises(ValueError, match="there is no batch to evaluate on"):
        fidelity(model, [])


def test_a_detector_without_logits_of_its_items():
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
    view, measure = fidelity(model, [{"pixel_values": torch.randn(2, 3, 32, 32)}])
    with half(view).applied(view):
        assert set(measure()) == {"cos %", "eval s"}
