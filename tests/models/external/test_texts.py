"""Texts packed by a model's own tokenizer."""

import pytest
import torch
import transformers

from models.external import model as external
from models.external.texts import packing
from tests import tiny_models
from tests.tiny_models import TEXT, tokenizer

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]

TEXTS = ["a red cat", "the dog", "a photo"]
IDS = [[8, 10, 11], [5, 12], [8, 9]]


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


def built(make, tmp_path, tokens=tokenizer):
    torch.manual_seed(0)
    return external.build(f"hf:{tiny_models.save(make(), tmp_path, tokens())}")


def test_rows_are_the_texts_one_behind_the_other(tmp_path):
    model = built(llama, tmp_path)
    pack = packing(model, 4)
    rows = pack.rows(TEXTS)
    assert sum(rows, []) == [*IDS[0], 2, *IDS[1], 2, *IDS[2], 2] and list(map(len, rows)) == [4, 4, 2]
    batch = pack([rows[0], rows[2]])
    assert batch["input_ids"].tolist() == [rows[0], [*rows[2], 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [rows[0], [*rows[2], -100, -100]]
    view = external.prunable_view(model)
    assert view.loss(batch).isfinite() and view.forward(batch) is not None
    assert packing(model).max_tokens == 64
    with pytest.raises(ValueError, match="--max_tokens 65: the model takes at most 64"):
        packing(model, 65)


def test_masked_words_alone_are_predicted_and_the_same_at_each_reading(tmp_path):
    def masking():
        tokens = tokenizer()
        tokens.add_special_tokens({"mask_token": "<mask>"})
        return tokens

    config = transformers.BertConfig(**{**TEXT, "vocab_size": 110})
    model = built(lambda: transformers.BertForMaskedLM(config), tmp_path, masking)
    pack = packing(model, 32)
    rows = pack.rows(TEXTS * 20)
    batch = pack(rows)
    hidden = batch["labels"] != -100
    assert 0 < hidden.sum() < 0.4 * hidden.numel()
    assert (batch["input_ids"][hidden] == pack.tokenizer.mask_token_id).all()
    ids = torch.tensor([row for row in rows if len(row) == 32])
    assert torch.equal(batch["labels"][: len(ids)][hidden[: len(ids)]], ids[hidden[: len(ids)]])
    assert all(torch.equal(value, batch[key]) for key, value in pack(rows).items())


def test_an_encoder_and_a_decoder_write_what_they_read(tmp_path):
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0
    )
    model = built(lambda: transformers.T5ForConditionalGeneration(config), tmp_path)
    batch = packing(model, 4)([[5, 6, 7], [8]])
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    view = external.prunable_view(model)
    assert view.loss(batch).isfinite() and view.forward(batch) is not None


def test_models_that_read_no_text_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only models of transformers have a tokenizer"):
        packing(torch.nn.Linear(2, 2))
    clip = built(tiny_models.clip, tmp_path / "clip")
    with pytest.raises(ValueError, match="CLIPModel compares texts with images: give a folder of images"):
        packing(clip)
    config = transformers.ViTConfig(**tiny_models.VISION)
    vit = built(lambda: transformers.ViTForImageClassification(config), tmp_path / "vit")
    with pytest.raises(ValueError, match="ViTForImageClassification reads pixel_values, no text alone"):
        packing(vit)
    bare = external.build(f"hf:{tiny_models.save(llama(), tmp_path / 'bare')}")
    with pytest.raises(ValueError, match="'.*bare' has no tokenizer"):
        packing(bare)
