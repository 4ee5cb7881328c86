import numpy as np
import pytest

from datasets.text import TextEncoder, clean_caption, mentions_side

CAPTION = "Three unaffable, grinning-mangoes; left of a tyrannosaurus!"


@pytest.mark.parametrize(
    ("raw", "words", "cleaned"),
    [
        ('A man\'s "Hat" (red) * #1: ok; ~ yes? No!', 30, "a mans hat red 1 ok yes no"),
        ("black-and-white/grey", 30, "black and white grey"),
        ("<person> next to <PERSON>.", 30, "person next to person"),
        ("  one\t two \n three  four ", 3, "one two three"),
        ("?!", 30, ""),
    ],
)
def test_clean_caption(raw, words, cleaned):
    assert clean_caption(raw, words) == cleaned
    assert clean_caption(cleaned, words) == cleaned


@pytest.mark.parametrize(
    ("caption", "says"), [("on the Left side", True), ("rightmost dog", True), ("a bright light", False)]
)
def test_mentions_side(caption, says):
    assert mentions_side(caption) is says


def words_of(text, ids):
    """Positions of each word of [CLS] x."""
    words = []
    for position in range(1, len(ids)):
        if text.tokenizer.id_to_token(int(ids[position])).startswith("##"):
            words[-1].add(position)
        else:
            words.append({position})
    return words


def test_template(text, tokenizer):
    fields = text("A dog", np.random.default_rng(0))
    dog = [tokenizer.token_to_id("a"), tokenizer.token_to_id("dog")]
    assert fields["text_ids"].tolist() == [tokenizer.cls_id, *dog, *[tokenizer.pad_id] * 9]
    assert fields["text_atts"].tolist() == [1] * 3 + [0] * 9
    with_sep = TextEncoder(tokenizer, 12, add_sep=True).plain(["a dog", "dog " * 40])
    assert with_sep["text_ids"][0].tolist() == [tokenizer.cls_id, *dog, tokenizer.sep_id, *[tokenizer.pad_id] * 8]
    assert with_sep["text_ids"][1].tolist() == [tokenizer.cls_id, *dog[1:] * 10, tokenizer.sep_id]
    assert with_sep["text_atts"].sum(1).tolist() == [4, 12]


def test_plain_is_the_unmasked_text(text):
    plain = text.plain([CAPTION, ""])
    alone = text(CAPTION, np.random.default_rng(0), masked=False)
    assert set(alone) == {"text_ids", "text_atts"}
    for name, value in alone.items():
        assert plain[name].dtype == value.dtype and plain[name].shape == (2, 12)
        assert plain[name][0].equal(value)
    assert text.plain([])["text_ids"].shape == (0, 12)


@pytest.mark.parametrize("max_tokens", [2, 5, 9, 40])
def test_masked_fields_agree_and_words_are_whole(tokenizer, max_tokens):
    text = TextEncoder(tokenizer, max_tokens)
    for seed in range(200):
        fields = {name: value.numpy() for name, value in text(CAPTION, np.random.default_rng(seed)).items()}
        assert all(value.dtype == np.int64 for value in fields.values())
        length = fields["text_atts"].sum()
        used = fields["masked_ids"] != -100
        chosen = fields["masked_pos"][used]
        assert 1 <= len(chosen) <= 8 and len(set(chosen)) == len(chosen)
        assert ((chosen >= 1) & (chosen < length)).all()
        assert (fields["masked_pos"][~used] == 0).all()
        assert (fields["masked_ids"][used] == fields["text_ids"][chosen]).all()
        others = np.setdiff1d(np.arange(max_tokens), chosen)
        assert (fields["text_ids_masked"][others] == fields["text_ids"][others]).all()
        words = words_of(text, fields["text_ids"][:length])
        assert all(word <= set(chosen) or word.isdisjoint(chosen) for word in words)
        if len(chosen) > max(1, round(length * 0.25)):  # more than the share: one word of many pieces
            assert set(chosen) in words


def test_a_word_of_more_pieces_than_slots_is_masked_in_part(tokenizer):
    text = TextEncoder(tokenizer, 40, max_masks=2)
    fields = text("tyrannosaurus", np.random.default_rng(0))
    assert (fields["masked_ids"] != -100).sum() == 2
    assert (fields["masked_pos"][1] - fields["masked_pos"][0]).item() == 1


def test_every_position_and_kind_of_mask_is_drawn_in_its_share(tokenizer):
    text = TextEncoder(tokenizer, 40)
    caption = " ".join(["dog cat house tree"] * 5)
    rng = np.random.default_rng(0)
    positions, masked, kept = np.zeros(40), 0, 0
    for _ in range(2000):
        fields = {name: value.numpy() for name, value in text(caption, rng).items()}
        chosen = fields["masked_pos"][fields["masked_ids"] != -100]
        assert len(chosen) == 5  # a quarter of 21
        positions[chosen] += 1
        masked += (fields["text_ids_masked"][chosen] == tokenizer.mask_id).sum()
        kept += (fields["text_ids_masked"][chosen] == fields["text_ids"][chosen]).sum()
    share = positions[1:21] / 2000
    assert positions[0] == 0 and np.abs(share - 0.25).max() < 0.06
    assert abs(masked / 10000 - 0.8) < 0.02 and abs(kept / 10000 - 0.1) < 0.02


def test_runs_of_words_are_masked_together_in_their_share(tokenizer):
    caption = " ".join(["dog cat house tree"] * 5)

    def neighbours(ngram_prob):
        text, rng = TextEncoder(tokenizer, 40, ngram_prob=ngram_prob), np.random.default_rng(0)
        drawn = [np.diff(np.sort(text(caption, rng)["masked_pos"][:5].numpy())) for _ in range(500)]
        return np.mean(np.concatenate(drawn) == 1)

    assert neighbours(0.0) < neighbours(0.2) < neighbours(1.0)
    assert neighbours(1.0) > 0.5


def test_random_words_are_never_special(tokenizer):
    text = TextEncoder(tokenizer, 12)
    special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    assert special.isdisjoint(text._ordinary.tolist())
    assert len(text._ordinary) == tokenizer.vocab_size - 5


def test_empty_caption_has_no_mask(text, tokenizer):
    for caption in ("", " ?! "):
        fields = text(caption, np.random.default_rng(0))
        assert fields["text_ids"].tolist() == fields["text_ids_masked"].tolist() == [tokenizer.cls_id] + [0] * 11
        assert fields["masked_ids"].tolist() == [-100] * 3 and fields["masked_pos"].tolist() == [0] * 3


def test_the_generator_decides(text):
    first, again = (text(CAPTION, np.random.default_rng(3)) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)


@pytest.mark.parametrize("bad", [{"max_tokens": 1}, {"max_masks": 0}, {"mask_prob": 0}, {"max_ngram": 1}])
def test_bad_arguments_are_named(tokenizer, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TextEncoder(tokenizer, **{"max_tokens": 12, **bad})
