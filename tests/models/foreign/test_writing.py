"""Captions as they are trained on and written: only their own tokens count, padding and neighbours change nothing, and
the loss is the one that transformers has for the same labels.
"""

import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from configs.foreign import ForeignCaptioningConfig
from configs.task import OptimizerConfig, SchedulerConfig
from models.foreign import captioning, vqa
from sparsity.errors import UserError
from tests import tiny_models
from tests.models.external.test_preprocessing import processor_of
from tests.tiny_models import TEXT, VISION, image_processor, tokenizer

pytestmark = pytest.mark.script  # long: left out of make test-fast

CAPTIONS = ["a red cat .", "a dog", "w20 w21 w22"]
KINDS = ["blip", "blip2", "llava", "qwen", "paligemma"]


def closed_tokenizer():
    """A tokenizer that begins and ends each text with tokens of its own, as BERT's does."""
    made = tokenizer()
    special = [("<start>", 97), ("</s>", 2)]
    made._tokenizer.post_processor = TemplateProcessing(single="<start> $A </s>", special_tokens=special)
    made.sep_token, made.cls_token = "</s>", "<start>"
    return made


def blip():
    text = {**TEXT, "bos_token_id": 1, "sep_token_id": 2, "encoder_hidden_size": 32, "is_decoder": True}
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=VISION))


def blip_for_questions(folder):
    """The model that answers questions, with its processor, in a folder."""
    text = {**TEXT, "bos_token_id": 1, "sep_token_id": 2, "encoder_hidden_size": 32, "is_decoder": True}
    model = transformers.BlipForQuestionAnswering(transformers.BlipConfig(text_config=text, vision_config=VISION))
    return tiny_models.save(model, folder, transformers.BlipProcessor(image_processor(), closed_tokenizer()))


def folder_of(kind, folder):
    torch.manual_seed(0)
    if kind == "blip":
        return tiny_models.save(blip(), folder, transformers.BlipProcessor(image_processor(), closed_tokenizer()))
    return tiny_models.save(tiny_models.TRANSFORMERS[kind](), folder, processor_of(kind, chat=kind != "blip2"))


def config(**change):
    return ForeignCaptioningConfig(
        optimizer=OptimizerConfig(lr=1e-3),
        scheduler=SchedulerConfig(epochs=1),
        batch_size_train=2,
        batch_size_target=2,
        data="x",
        **change,
    )


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: captioning.build(f"hf:{folder_of(kind, folder / kind)}", config()) for kind in KINDS}


def items(pictures, captions=CAPTIONS):
    return [
        {"image": image, "caption": text, "index": torch.tensor(i)}
        for i, (image, text) in enumerate(zip(pictures, captions, strict=False))
    ]


@pytest.fixture(scope="module")
def pictures():
    return [Image.new("RGB", (40, 50), colour) for colour in ("red", "blue", "green")]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tokens_of_captions_and_their_end_are_learned(writers, pictures, kind):
    writer = writers[kind]
    batch = writer.questions.answered(items(pictures))
    words = writer.processor.tokenizer
    wanted = [[*words(text, add_special_tokens=False)["input_ids"], writer.writing.end] for text in CAPTIONS]
    assert [row[row != -100].tolist() for row in batch["labels"]] == wanted
    learned = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][learned], batch["labels"][learned])
    assert batch["attention_mask"][learned].all()
    assert (batch["attention_mask"][:, :-1] >= batch["attention_mask"][:, 1:]).all()  # padded to the right


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_captions(writers, pictures, kind):
    writer = writers[kind]
    batch = writer.questions.answered(items(pictures))
    writer.eval()
    loss = writer(batch)["loss"]
    logits = writer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"][:, 1:]
    naive = F.cross_entropy(logits[:, :-1][labels != -100], labels[labels != -100])
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, writer.model(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_change_no_loss(writers, pictures, kind):
    """The sum of the losses of captions alone is that of the batch: padding is not seen."""
    writer = writers[kind].eval()
    together, alone = writer.questions.answered(items(pictures)), 0.0
    for item in items(pictures):
        batch = writer.questions.answered([item])
        alone += writer(batch)["loss"].item() * int((batch["labels"] != -100).sum())
    count = int((together["labels"] != -100).sum())
    assert writer(together)["loss"].item() * count == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_caption_is_written(writers, pictures, kind):
    """After some steps on one caption for all, generation writes it and stops: both begin at the same place."""
    writer = writers[kind]
    text = "a red dog ."
    batch = writer.questions.answered(items(pictures[:2], [text, text]))
    state = {name: tensor.clone() for name, tensor in writer.state_dict().items()}
    optimizer = torch.optim.Adam(writer.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = writer(batch)["loss"]
        loss.backward()
        optimizer.step()
    asked = writer.questions.asked(items(pictures[:2]))
    ids = writer.generate(asked["image"], max_length=12, num_beams=2)
    assert loss < 0.1 and [writer.decode(row) for row in ids.tolist()] == [text, text]
    assert ids.shape[1] <= 12 and asked["index"].tolist() == [0, 1]
    writer.load_state_dict(state)


def test_paligemma_is_asked_as_its_processor_asks(writers, pictures):
    """Its own batch of a prefix and a suffix: the same ids, labels, and who sees whom."""
    writer = writers["paligemma"]
    own = writer.questions.answered(items(pictures))
    asked = [f"<image>{writer.questions.question}"] * len(CAPTIONS)
    theirs = writer.processor(images=pictures, text=asked, suffix=CAPTIONS, padding=True, return_tensors="pt")
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], field) for name, field in theirs.items())
    batch = {name: field for name, field in own.items() if name != "labels"}
    logits = writer.eval().model(**batch).logits
    first = int((own["labels"][0] == -100).sum())
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, first - 1] = 20  # the last token of the question
    others = writer.model(**changed).logits
    assert not torch.equal(logits[0, 0], others[0, 0]), "each sees all of the question"
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, first] = 20  # the first of the answer
    torch.testing.assert_close(writer.model(**changed).logits[0, :first], logits[0, :first])


def test_what_does_not_write_is_refused(tmp_path):
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    folder = tiny_models.save(tiny_models.clip(), tmp_path, processor)
    with pytest.raises(UserError, match="CLIPModel does not write about images"):
        captioning.build(f"hf:{folder}", config())


def test_long_captions_are_cut_without_an_end(tmp_path, pictures):
    writer = captioning.build(f"hf:{folder_of('blip2', tmp_path)}", config(max_tokens=3))
    batch = writer.questions.answered(items(pictures))
    lengths = [(row != -100).sum().item() for row in batch["labels"]]
    assert lengths == [3, 3, 3] and (batch["labels"] == writer.writing.end).any(1).tolist() == [False, True, False]


QUESTIONS = ["the red photo .", "a dog", "the photo w20 w21 w22 w23 ."]


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    folder, asks = tmp_path_factory.mktemp("answering"), Asks()
    folders = {kind: folder_of(kind, folder / kind) for kind in KINDS if kind != "blip"}
    folders["blip"] = blip_for_questions(folder / "blip")
    return {kind: vqa.build(f"hf:{where}", asks) for kind, where in folders.items()}


class Asks:
    weights, weights_key, max_tokens, wording = "published", "", None, None


def asked_items(pictures):
    return [
        {**item, "question": question, "answer": item["caption"]}
        for item, question in zip(items(pictures), QUESTIONS, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_alone_are_learned_and_neighbours_change_none(answering, pictures, kind):
    writer = answering[kind].eval()
    batch = writer.questions.answered(asked_items(pictures))
    words = writer.processor.tokenizer
    wanted = [[*words(text, add_special_tokens=False)["input_ids"], writer.writing.end] for text in CAPTIONS]
    begun = 1 if kind == "blip" else 0  # the token that its decoder begins with is shifted out of the loss
    assert [row[row != -100].tolist()[begun:] for row in batch["labels"]] == wanted
    if kind == "blip":  # versions of transformers have its decoder read the padding of questions
        return
    alone = 0.0
    for item in asked_items(pictures):
        one = writer.questions.answered([item])
        alone += writer(one)["loss"].item() * int((one["labels"] != -100).sum())
    count = int((batch["labels"] != -100).sum())
    assert writer(batch)["loss"].item() * count == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_other_lengths_change_no_answer(answering, pictures, kind):
    writer, given = answering[kind], {"max_length": 6, "num_beams": 2}
    together = writer.generate(writer.questions.asked(asked_items(pictures))["image"], **given)
    for item, row in zip(asked_items(pictures), together, strict=True):
        (alone,) = writer.generate(writer.questions.asked([item])["image"], **given)
        assert row[row > 0].tolist() == alone[alone > 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_learned_answers_are_written(answering, pictures, kind):
    writer = answering[kind]
    batch = writer.questions.answered(asked_items(pictures))
    optimizer = torch.optim.Adam(writer.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = writer(batch)["loss"]
        loss.backward()
        optimizer.step()
    ids = writer.generate(writer.questions.asked(asked_items(pictures))["image"], max_length=8, num_beams=2)
    assert loss < 0.2 and [writer.decode(row) for row in ids.tolist()] == CAPTIONS


def test_a_blip_of_captions_answers_nothing(tmp_path):
    with pytest.raises(UserError, match="give a BlipForQuestionAnswering"):
        vqa.build(f"hf:{folder_of('blip', tmp_path)}", Asks())
