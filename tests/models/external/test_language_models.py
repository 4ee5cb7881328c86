"""Language models inside of others: what a calibration pass runs, and which of their tokens count."""

import pytest
import torch

import pruners
from models.external import model as external
from sparsity.errors import UserError
from sparsity.statistics.inputs import Statistics
from tests import tiny_models
from tests.tiny_models import IMAGE_TOKEN, TRANSFORMERS, batch_for

pytestmark = pytest.mark.script

READERS = ["llava", "qwen", "idefics3", "smolvlm", "paligemma", "blip2"]


def built(kind):
    torch.manual_seed(0)
    return TRANSFORMERS[kind]().eval()


@pytest.mark.parametrize("kind", READERS)
def test_a_pass_keeps_no_cache_and_makes_the_logits_of_one_token(kind):
    model = built(kind)
    view, batch, made = external.prunable_view(model), batch_for(kind), []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, args, output: made.append(output.shape))
    with torch.no_grad():
        output = view.forward(batch)
        whole = model(**batch, use_cache=False)
    hook.remove()
    assert made[0] == (2, 1, 99) and made[1][1] > 1
    assert output.get("past_key_values") is None and output.get("loss") is None
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1])
    assert view.loss(batch).isfinite(), "the loss has all of them"
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("tokens", ["text", "vision"])
def test_tokens_of_choice_count_in_the_language_model_alone(kind, tokens):
    model, batches = built(kind), [batch_for(kind, seed) for seed in range(2)]
    everything, chosen = (external.prunable_view(model, tokens=each) for each in ("all", tokens))
    sums = {}
    for view in (everything, chosen):
        with Statistics(view, "input_norms") as statistics:
            for batch in batches:
                statistics.add(batch)
        sums[view] = statistics
    for name, weight in everything.weights.items():
        counted, before = sums[chosen].tokens[name], sums[everything].tokens[name]
        if weight.group != "text":
            assert counted == before
            continue
        images = sum(int((batch["input_ids"] == IMAGE_TOKEN).sum()) for batch in batches)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert before == real and counted == (images if tokens == "vision" else real - images)


def test_texts_and_images_add_up_to_all():
    model, batch = built("llava"), batch_for("llava")
    found = {}
    for tokens in ("all", "text", "vision"):
        view = external.prunable_view(model, tokens=tokens)
        with Statistics(view, "gram") as statistics:
            statistics.add(batch)
        found[tokens] = statistics.result()
    for name in view.groups["text"]:  # products in float32
        torch.testing.assert_close(
            found["text"][name] + found["vision"][name], found["all"][name], rtol=1e-4, atol=1e-5
        )


def test_models_without_image_tokens_have_no_choice():
    with pytest.raises(UserError, match="--calibrate_on text: CLIPModel has no language model that reads images"):
        external.prunable_view(tiny_models.clip(), tokens="text")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_every_kind_is_pruned_by_scores_by_blocks_and_by_gradients(kind):
    unread = ["model.vision_tower.encoder.layers.1"] if kind == "llava" else []  # it takes the last but one
    view, batches = external.prunable_view(built(kind), exclude=unread), [batch_for(kind, seed) for seed in range(2)]
    for name in ("wanda", "sparsegpt", "snip"):
        if name == "snip" and kind == "siglip":  # its loss is made by another argument
            continue
        ((_, masks),) = pruners.build(name).prune(view, batches, [0.5])
        assert abs(masks.total - masks.kept - masks.total // 2) <= len(masks) * 64
