"""Re-ranked retrieval against the loop over one query at a time, and what happens to images that cannot be read."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import nn
from torch.nn import functional as F

from configs.pruning import Evaluation
from configs.sources import Files
from datasets.bundled.glyphs import load_glyphs
from datasets.text import TextEncoder
from engine.evaluation.reranking import NOT_RANKED, Share, retrieval_scores
from engine.evaluation.retrieval import READ, ZeroShot
from models.blip import model as blip
from models.parts.bert import TextConfig
from models.parts.clip_vision import VisionConfig
from models.parts.tokenizer import WordPiece
from models.xvlm import model as xvlm
from sparsity.errors import UserError
from tests.toys import Ranks

VISION = VisionConfig(image_size=32, patch_size=16, width=16, layers=2, heads=2, mlp_width=32, local_attn_depth=1)
TEXT = TextConfig(vocab_size=2048, width=16, layers=2, fusion_layer=1, heads=2, mlp_width=32, max_positions=32)


BLIP_TEXT = TextConfig(**{**vars(TEXT), "fusion_layer": 0, "token_types": False})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return xvlm.build(xvlm.Config(vision=VISION, text=TEXT, embed_dim=8, max_tokens=32))


@pytest.fixture(scope="module")
def blip_model():
    torch.manual_seed(0)
    vision = blip.VisionConfig(image_size=32, patch_size=16, width=16, layers=2, heads=2)
    return blip.build(blip.Config(vision=vision, text=BLIP_TEXT, embed_dim=8, max_tokens=32, queue_size=8))


@pytest.fixture(scope="module")
def encode():
    return TextEncoder(WordPiece("data/vocab/mini_vocab.txt"), 16)


@pytest.fixture(scope="module")
def pairs(encode):
    """Images (7, 3, 32, 32) and the fields of 11 texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    texts = encode.plain([" ".join(["red apple", "cat", "dog left of fish"][: 1 + i % 3]) + f" {i}" for i in range(11)])
    return torch.randn(7, 3, 32, 32, generator=generator), texts


@torch.no_grad()
def naive(model, images, texts, k_test):
    """One query at a time, as ALBEF's evaluation has it."""
    model = model.eval()
    tokens, image_feat = model.encode_image(images)
    states, text_feat = model.encode_text(texts["text_ids"], texts["text_atts"])
    scores = []
    for similarity, is_text in ((image_feat @ text_feat.t(), False), (text_feat @ image_feat.t(), True)):
        table = torch.full_like(similarity, NOT_RANKED)
        for query, row in enumerate(similarity):
            for candidate in row.topk(min(k_test, len(row))).indices:
                text, image = (query, candidate) if is_text else (candidate, query)
                logits = model.match(states[text][None], texts["text_atts"][text][None], tokens[image][None])
                table[query, candidate] = model.pair_scores(logits, row[candidate][None])[0]
        scores.append(table)
    return scores


@pytest.mark.parametrize("k_test", [1, 3, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_equals_one_query_at_a_time(model, pairs, k_test, batch_size):
    images, texts = pairs
    ours = retrieval_scores(model, images.split(3), texts, k_test=k_test, batch_size=batch_size)
    for actual, expected in zip(ours, naive(model, images, texts, k_test), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert (actual == NOT_RANKED).sum() == (expected == NOT_RANKED).sum()


@pytest.mark.parametrize("k_test", [3, 100])
def test_blip_equals_one_query_at_a_time(blip_model, pairs, k_test):
    images, texts = pairs
    ours = retrieval_scores(blip_model, images.split(3), texts, k_test=k_test, batch_size=4)
    for actual, expected in zip(ours, naive(blip_model, images, texts, k_test), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_more_candidates_than_there_are_ranks_them_all(model, pairs):
    i2t, t2i = retrieval_scores(model, [pairs[0]], pairs[1], k_test=12)
    assert not (i2t == NOT_RANKED).any() and not (t2i == NOT_RANKED).any()
    torch.testing.assert_close(i2t, t2i.t(), rtol=1e-4, atol=1e-5)


def test_an_image_is_projected_once_and_pairs_are_matched_once(model, pairs, monkeypatch):
    """And none with the padding of longer texts than there are in its batch."""
    project, match, projected, shapes = model.project_image, model.match, [], []
    monkeypatch.setattr(model, "project_image", lambda tokens: projected.append(len(tokens)) or project(tokens))
    monkeypatch.setattr(model, "match", lambda ids, *rest: shapes.append(ids.shape[:2]) or match(ids, *rest))
    images, texts = pairs
    i2t, t2i = retrieval_scores(model, [images], texts, k_test=3, batch_size=4)
    candidates = (i2t != NOT_RANKED) | (t2i.t() != NOT_RANKED)
    assert projected == [1] * 7
    assert sum(rows for rows, _ in shapes) == int(candidates.sum()) < (7 + 11) * 3
    lengths = [texts["text_atts"].sum(1)[own].sort().values for own in candidates]
    assert [longest for _, longest in shapes] == [int(part[-1]) for own in lengths for part in own.split(4)]


def test_without_candidates_the_similarity_counts(model, pairs):
    i2t, t2i = retrieval_scores(model, [pairs[0]], pairs[1], k_test=0)
    assert i2t.shape == (7, 11) and torch.equal(i2t, t2i.t()) and i2t.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_ranks_share_the_images(model, pairs, ranks):
    """Each encodes its images alone, some have none, and all get the scores of one process."""
    images, texts = pairs
    whole = retrieval_scores(model, [images], texts, k_test=3)
    seen = [[] for _ in range(ranks)]

    def one(rank):
        own, replica = list(range(7))[rank::ranks], copy.deepcopy(model)
        encode = replica.encode_image
        replica.encode_image = lambda batch: seen[rank].append(len(batch)) or encode(batch)
        return retrieval_scores(replica, [images[own]] if own else [], texts, k_test=3, share=Share(own, total))

    total = Ranks(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        for found in pool.map(one, range(ranks)):
            for actual, expected in zip(found, whole, strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert sum(sum(batches) for batches in seen) == 7


def test_under_autocast_only_the_encoders_are_rounded(model, pairs):
    """Scores are float32 and of many digits; in bfloat16 there are 256 numbers between 1 and 2."""
    images, texts = pairs
    exact = retrieval_scores(model, [images], texts, k_test=100)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for k_test in (0, 100):
            scores = retrieval_scores(model, [images], texts, k_test=k_test)[0]
            assert scores.dtype == torch.float32 and len(scores.unique()) == scores.numel()
            assert (scores != scores.bfloat16()).float().mean() > 0.9
    assert 0 < (scores - exact).abs().max() < 0.1 * exact.std() + 0.05


def test_tokens_in_half_precision_say_what_they_change(model, pairs, caplog):
    images, texts = pairs
    exact = retrieval_scores(model, images.split(2), texts, k_test=4)
    with caplog.at_level("INFO"):
        half = retrieval_scores(model, images.split(2), texts, k_test=4, half=True)
    (told,) = caplog.messages
    assert told.startswith("image tokens in float16: scores of 4 images differ by at most ")
    worst = max((a - b).abs().max().item() for a, b in zip(exact, half, strict=True))
    assert 0 < float(told.split("at most ")[1].split()[0]) <= 1.1 * worst < 1e-2


def test_tokens_that_float16_cannot_hold_are_refused(model, pairs, monkeypatch):
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda batch: (encode(batch)[0] * 1e5, encode(batch)[1]))
    with pytest.raises(ValueError, match="float16 cannot hold"):
        retrieval_scores(model, [pairs[0]], pairs[1], k_test=2, half=True)


def test_the_mode_of_the_model_comes_back(model, pairs):
    for mode in (True, False):
        model.train(mode)
        retrieval_scores(model, [pairs[0]], pairs[1], k_test=2)
        assert model.training is mode


def test_images_that_are_nan_rank_nowhere(model, pairs):
    images, texts = pairs
    images = images.clone()
    images[2] = torch.nan
    i2t, t2i = retrieval_scores(model, [images], texts, k_test=3)
    assert i2t[2].isnan().all() and t2i[:, 2].isnan().all()
    others = [0, 1, 3, 4, 5, 6]
    assert not i2t[others].isnan().any() and not t2i[:, others].isnan().any()
    alone = retrieval_scores(model, [images[others]], texts, k_test=3)[1]
    torch.testing.assert_close(t2i[:, others], alone, rtol=1e-4, atol=1e-5)  # it takes no candidate's place


def test_scenes_with_features_that_match_are_found(encode, tmp_path):
    """A stand-in whose texts are the images themselves is always right."""

    class Knows(nn.Module):
        def encode_image(self, image):
            tokens = image.flatten(1)
            return tokens[:, None], F.normalize(tokens, dim=-1)

        def encode_text(self, ids, atts):
            padded = F.pad(ids, (0, self.ids.shape[1] - ids.shape[1]))
            known = self.known[[int((self.ids == row).all(1).nonzero()) for row in padded]]
            return known[:, None].expand(-1, ids.shape[1], -1), F.normalize(known, dim=-1)

        def project_image(self, tokens):
            return tokens

        def match(self, states, atts, image):
            right = (states[:, 0] - image[:, 0]).abs().amax(1) == 0
            return torch.stack([torch.zeros(len(right)), right.float()], 1)

        def pair_scores(self, logits, similarity):
            return logits[:, 1]

    fabric = Fabric(accelerator="cpu", devices=1)
    known = Knows()
    for k_test in (0, 4):
        zero_shot = ZeroShot(known, Evaluation(k_test, bundled_scenes=12), encode, fabric, VISION, tmp_path)
        known.known = torch.cat([known.encode_image(batch)[0][:, 0] for batch in zero_shot._read()])
        known.ids = zero_shot.texts["text_ids"]
        metrics = zero_shot()
        assert metrics["txt_r1"] == metrics["img_r1"] == metrics["r_mean"] == 100.0
        assert zero_shot.found == [zero_shot.txt2img]
        assert np.array_equal(zero_shot.picture(3), zero_shot.items.scene(3).image)


@pytest.fixture
def files(tmp_path):
    """Twelve images with captions in the COCO layout, one of which is no image."""
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    names = load_glyphs().names
    records = [{"image": f"{i}.png", "caption": [names[i], f"picture of {names[i]}"]} for i in range(12)]
    (tmp_path / "coco_test.json").write_text(json.dumps(records))
    return Files(str(tmp_path / "coco_test.json"), str(tmp_path))


def test_unreadable_images_are_listed_and_count_as_not_found(model, encode, files, tmp_path):
    fabric, folder = Fabric(accelerator="cpu", devices=1), tmp_path / "out"
    evaluation = Evaluation(k_test=12, files=files)
    zero_shot = ZeroShot(model, evaluation, encode, fabric, VISION, folder, max_skipped=0.1, workers=1)
    first, second = zero_shot(), zero_shot()  # counted anew at each call
    assert first == second and first["txt_r10"] <= 100 * 11 / 12
    (line,) = (folder / "skipped.txt").read_text().splitlines()
    assert line.startswith(str(tmp_path / "5.png")) and zero_shot.picture(5) is None
    strict = ZeroShot(model, evaluation, encode, fabric, VISION, folder)
    with pytest.raises(ValueError, match="1 of 12 samples were skipped"):
        strict()


def test_several_captions_of_an_image(model, encode, files, tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "5.png")
    fabric = Fabric(accelerator="cpu", devices=1)
    zero_shot = ZeroShot(model, Evaluation(k_test=3, files=files), encode, fabric, VISION, tmp_path)
    assert len(zero_shot.texts["text_ids"]) == 24
    assert zero_shot.img2txt[1] == [2, 3] and zero_shot.txt2img[:4] == [0, 0, 1, 1]
    assert set(zero_shot()) >= {"txt_r1", "img_r1", "txt_r5", "img_r5", "txt_r10", "img_r10", "r_mean"}


class Rank:
    """The second of two; what the first gives is added."""

    global_rank, world_size, is_global_zero, device = 1, 2, False, torch.device("cpu")

    def __init__(self, other=0.0):
        self.other = other

    def all_reduce(self, tensor, reduce_op):
        return tensor + self.other


def test_a_rank_reads_whole_batches_of_its_own(model, encode, tmp_path):
    zero_shot = ZeroShot(model, Evaluation(bundled_scenes=2 * READ + 5), encode, Rank(), VISION, tmp_path)
    assert zero_shot.own == list(range(READ, 2 * READ)) and [len(batch) for batch in zero_shot._read()] == [READ]


def test_too_many_unreadable_images_of_one_rank_end_all_of_them(model, encode, tmp_path):
    zero_shot = ZeroShot(model, Evaluation(bundled_scenes=2 * READ), encode, Rank(1.0), VISION, tmp_path)
    with pytest.raises(UserError, match="too many images of another rank"):
        list(zero_shot._read())
