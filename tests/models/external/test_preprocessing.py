"""Images, captions and classes become batches that a model takes, by its own preprocessing."""

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_data_config

from models.external import model as external
from models.external.preprocessing import PROMPT, preprocessing
from tests import tiny_models
from tests.tiny_models import IMAGE_TOKEN, TRANSFORMERS, VISION, image_processor, tokenizer

CAPTIONS = ["a red cat .", "a dog"]
ANSWERS = [[8, 10, 11, 7], [8, 12]]  # ids of their words


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


# A chat template: the parts of a question end with a colon, those of an answer with the end of the text.
TEMPLATE = """{% for m in messages %}{% for c in m['content'] -%}
{% if c['type'] == 'image' %}PLACE {% else %}{{ c['text'] }} {% endif %}{% endfor -%}
{% if m['role'] == 'user' %}: {% else %}</s>{% endif %}{% endfor %}"""


def processor_of(kind, chat=False):
    """The processor as it is published with such a model."""
    if kind == "clip":
        return transformers.CLIPProcessor(image_processor(), tokenizer())
    if kind == "blip2":
        return transformers.Blip2Processor(image_processor(), tokenizer(), num_query_tokens=4)
    if kind == "llava":
        options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        template = TEMPLATE.replace("PLACE", "<image>") if chat else None
        return transformers.LlavaProcessor(image_processor(), tokenizer(), chat_template=template, **options)
    if kind == "paligemma":
        images = image_processor()
        images.image_seq_length = 4
        return transformers.PaliGemmaProcessor(images, tokenizer())
    options = {"patch_size": 14, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 56 * 56}
    images, videos = transformers.Qwen2VLImageProcessor(**options), transformers.Qwen2VLVideoProcessor(**options)
    template = TEMPLATE.replace("PLACE", "<start> <|image_pad|> <end>")
    return transformers.Qwen2_5_VLProcessor(images, tokenizer("<|image_pad|>"), videos, chat_template=template)


def published(kind, folder, **options):
    torch.manual_seed(0)
    model = external.build(f"hf:{tiny_models.save(TRANSFORMERS[kind](), folder, processor_of(kind, **options))}")
    return model, preprocessing(model)


def test_timm_images_are_those_of_its_data_configuration(images):
    model = timm.create_model("test_vit", num_classes=3).eval()
    preprocess = preprocessing(model)
    transform = create_transform(**resolve_data_config({}, model=model))
    expected = torch.stack([transform(image) for image in images])
    (pixels,) = preprocess(images, None, None)
    assert torch.equal(pixels, expected) and model(pixels).shape == (2, 3)
    pixels, labels = preprocess(images, None, preprocess.labels(["a", "b", "c"])[1:])
    assert labels.tolist() == [1, 2] and external.prunable_view(model).loss((pixels, labels)).isfinite()


def test_classifiers_of_transformers_know_their_classes(tmp_path, images):
    config = transformers.ViTConfig(**VISION, id2label={0: "tulip", 1: "rose", 2: "lily"})
    model = transformers.ViTForImageClassification(config)
    model = external.build(f"hf:{tiny_models.save(model, tmp_path, image_processor())}")
    preprocess = preprocessing(model)
    assert preprocess.labels(["lily", "rose", "tulip"]) == [2, 1, 0]
    batch = preprocess(images, None, [2, 0])
    assert torch.equal(batch["pixel_values"], image_processor()(images, return_tensors="pt")["pixel_values"])
    assert external.prunable_view(model).loss(batch).isfinite()
    assert set(preprocess(images, None, None)) == {"pixel_values"}


def test_pairs_with_captions_have_a_loss_and_without_them_are_refused(tmp_path, images):
    model, preprocess = published("clip", tmp_path)
    batch = preprocess(images, CAPTIONS, None)
    assert [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ] == ANSWERS
    assert batch["return_loss"] and external.prunable_view(model).loss(batch).isfinite()
    assert preprocess.labels(["a", "b"]) is None
    for refused in (lambda: preprocess.check(False), lambda: preprocess(images, None, None)):
        with pytest.raises(
            ValueError, match="CLIPModel reads texts, and the folder has no captions: put captions.json"
        ):
            refused()


def test_texts_longer_than_the_positions_are_cut(tmp_path, images):
    model, preprocess = published("clip", tmp_path)
    batch = preprocess(images, ["red " * 100, "dog"], None)
    assert batch["input_ids"].shape == (2, 64)
    model(**batch)


@pytest.mark.parametrize(("kind", "chat"), [("blip2", False), ("llava", False), ("llava", True), ("qwen", True)])
def test_generative_models_are_asked_and_answer_the_caption(tmp_path, images, kind, chat):
    model, preprocess = published(kind, tmp_path, chat=chat)
    view = external.prunable_view(model)
    asked = preprocess(images, CAPTIONS, None)
    preprocess.check(True)
    with pytest.raises(ValueError, match="reads texts, and the folder has no captions: put captions.json in it"):
        preprocess.check(False)
    places = 6 if kind == "qwen" else 4  # of 56 x 84 pixels
    assert (asked["input_ids"] == IMAGE_TOKEN).sum(1).tolist() == [places] * 2
    words = tokenizer()(PROMPT)["input_ids"]
    assert all(str(words)[1:-1] in str(row.tolist()) for row in asked["input_ids"])
    view.forward(asked)

    batch = preprocess(images, CAPTIONS, None)
    ends = [2] if chat else []  # the template ends an answer
    assert [row[row != -100].tolist() for row in batch["labels"]] == [answer + ends for answer in ANSWERS]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    torch.testing.assert_close(view.loss(batch), model(**batch).loss)


def test_a_prompt_does_not_see_the_caption(tmp_path, images):
    """PaliGemma's image and prompt see each other both ways: no other caption changes what is computed for them."""
    model, preprocess = published("paligemma", tmp_path)
    batches = [preprocess(images, captions, None) for captions in (CAPTIONS, ["a dog", "a red cat ."])]
    assert [row[row != -100].tolist() for row in batches[0]["labels"]] == [[*answer, 2] for answer in ANSWERS]
    states = [model(**batch).logits[:, :5] for batch in batches]
    torch.testing.assert_close(*states)
    view = external.prunable_view(model)
    view.forward(batches[0])
    torch.testing.assert_close(view.loss(batches[0]), model(**batches[0]).loss)


def test_a_text_decoder_beside_an_encoder_reads_the_captions(tmp_path, images):
    torch.manual_seed(0)
    text = {
        "model_type": "t5",
        "vocab_size": 99,
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "d_kv": 16,
    }
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**tiny_models.TEXT, "encoder_hidden_size": 32},
        text_config={**text, "decoder_start_token_id": 0, "pad_token_id": 0},
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    folder = tiny_models.save(transformers.Blip2ForConditionalGeneration(config), tmp_path, processor_of("blip2"))
    model = external.build(f"hf:{folder}")
    preprocess, view = preprocessing(model), external.prunable_view(model)
    batch = preprocess(images, CAPTIONS, None)
    assert batch["labels"].tolist() == [ANSWERS[0], [*ANSWERS[1], -100, -100]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]], "the first token, then the caption"
    assert view.loss(batch).isfinite()
    name = next(name for name in view.weights if ".decoder." in name)
    assert torch.equal(view.valid_tokens(name, batch), batch["decoder_attention_mask"].bool())
    view.forward(batch)
    with pytest.raises(ValueError, match="reads texts, and the folder has no captions"):
        preprocess(images, None, None)


def test_what_has_no_preprocessing_is_refused(tmp_path):
    own = "give --calibration package.module:loader"
    with pytest.raises(ValueError, match=f"only models of timm and transformers bring their preprocessing; {own}"):
        preprocessing(torch.nn.Linear(2, 2))
    model = external.build(f"hf:{tiny_models.save(tiny_models.clip(), tmp_path / 'bare')}")
    with pytest.raises(ValueError, match=f"'.*bare' has no processor: .*{own}") as caught:
        preprocessing(model)
    assert "\n" not in str(caught.value)
    text = transformers.BertModel(transformers.BertConfig(**tiny_models.TEXT))
    model = external.build(f"hf:{tiny_models.save(text, tmp_path / 'text', tokenizer())}")
    with pytest.raises(ValueError, match="BertModel takes no images; give a file of texts"):
        preprocessing(model)
