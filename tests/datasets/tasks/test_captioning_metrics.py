"""Metrics of captions against values computed by hand and by their definitions, with Java and without."""

import collections
import logging
import math
import subprocess
import sys

import pytest

from datasets.tasks import captioning_metrics
from datasets.tasks.captioning_metrics import (
    CaptionScorer,
    check_package,
    has_java,
    own_tokens,
    plain_metrics,
    public_tokens,
)

needs_java = pytest.mark.skipif(not has_java(), reason="no Java")
CAPTIONS = {1: "a cat on a mat", 2: "two dogs run", 5: "red apple left of green pear"}
REFERENCES = {
    1: ["a cat is on the mat", "there is a cat"],
    2: ["two dogs run fast"],
    5: ["green pear right of red apple", "red apple left of a green pear", "fruit"],
}


def tokens():
    return {image: [text] for image, text in CAPTIONS.items()}, REFERENCES


def test_bleu_by_hand():
    """Without the third image. 1-grams: 4 of 5 (one "a" too many) and 3 of 3; 2-grams: 1 of 4 and 2 of 2. 8 tokens, as
    many as the closest references have.
    """
    found = plain_metrics(*({i: part[i] for i in (1, 2)} for part in tokens()))
    assert found["bleu_1"] == pytest.approx(100 * 7 / 8)
    assert found["bleu_2"] == pytest.approx(100 * math.sqrt(7 / 8 * 3 / 6))


def test_bleu_punishes_brevity():
    found = plain_metrics({1: ["a cat"]}, {1: ["a cat on a mat"]})
    assert found["bleu_1"] == pytest.approx(100 * math.exp(1 - 5 / 2))


def test_rouge_by_hand():
    """Longest common subsequences: "a cat on mat" (4 of 5 and of 6), "two dogs run" (3 of 3 and of 4); F with beta 1.2,
    of the best precision and the best recall over the references.
    """
    found = plain_metrics(*({i: part[i] for i in (1, 2)} for part in tokens()))
    scores = [2.44 * p * r / (r + 1.44 * p) for p, r in ((4 / 5, 4 / 6), (1, 3 / 4))]
    assert found["rouge_l"] == pytest.approx(100 * sum(scores) / 2)


def ngrams(text, n):
    words = text.split()
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider(captions, references):
    """CIDEr-D by its definition (arXiv 1411.5726, section 5 and appendix): sigma 6, n up to 4, counts clipped."""
    total, images = 0.0, len(captions)
    for n in range(1, 5):
        present = collections.Counter(
            g for own in references.values() for g in set().union(*(ngrams(r, n) for r in own))
        )

        def vector(text, n=n, present=present):
            return {g: count * math.log(images / max(1, present[g])) for g, count in ngrams(text, n).items()}

        for image, caption in captions.items():
            a = vector(caption)
            for reference in references[image]:
                b = vector(reference)
                dot = sum(min(value, b.get(g, 0.0)) * b.get(g, 0.0) for g, value in a.items())
                norms = [math.sqrt(sum(value**2 for value in v.values())) for v in (a, b)]
                length = len(caption.split()) - len(reference.split())
                similarity = dot / (norms[0] * norms[1]) if all(norms) else 0.0
                total += similarity * math.exp(-(length**2) / (2 * 6**2)) / len(references[image]) / 4
    return 10 * total / images


def test_cider_by_its_definition():
    found = plain_metrics(*tokens())
    assert found["cider"] == pytest.approx(100 * cider(CAPTIONS, REFERENCES), rel=1e-6)
    assert 50 < found["cider"] < 1000


def test_what_is_better_scores_more():
    right = {image: [texts[0]] for image, texts in REFERENCES.items()}
    best, middle = plain_metrics(right, REFERENCES), plain_metrics(*tokens())
    worst = plain_metrics(dict.fromkeys(REFERENCES, [""]), REFERENCES)
    assert all(best[name] > middle[name] > worst[name] for name in best)
    assert best["bleu_4"] == pytest.approx(100) and best["rouge_l"] == pytest.approx(100)


def test_own_tokens():
    found = own_tokens({3: ["A man's well-worn hat, (red)!", " two\n dogs "], 4: [""]})
    assert found == {3: ["a man's well-worn hat red", "two dogs"], 4: [""]}


@needs_java
def test_public_tokens():
    """Lines stay apart whatever is in them."""
    texts = {3: ["A cat's hat, (red)!", "two\r\n dogs \u2028 run", ""], 1: ["an émigré"]}
    assert public_tokens(texts) == {3: ["a cat 's hat -lrb- red -rrb-", "two dogs run", ""], 1: ["an émigré"]}


@needs_java
def test_public_tokens_are_those_of_the_package(capfd):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = {5: ["A dog -- on the street; it's 5 o'clock...", "Don't"], 2: ["The U.S. flag?"]}
    theirs = PTBTokenizer().tokenize({image: [{"caption": text} for text in own] for image, own in texts.items()})
    assert public_tokens(texts) == theirs
    capfd.readouterr()


@pytest.mark.slow
@needs_java
def test_metrics_with_java(capfd):
    scorer = CaptionScorer()
    metrics = scorer(CAPTIONS, REFERENCES)
    expected = plain_metrics(public_tokens({i: [text] for i, text in CAPTIONS.items()}), public_tokens(REFERENCES))
    assert {name: metrics[name] for name in expected} == expected and scorer.best == "cider"
    assert 10 < metrics["meteor"] < 100 and ("spice" in metrics) == captioning_metrics.has_spice()
    assert scorer.quick(CAPTIONS, REFERENCES) == expected
    assert capfd.readouterr().out == ""  # the package prints where it can


def test_metrics_without_java_are_marked(caplog):
    caplog.set_level(logging.INFO)
    scorer = CaptionScorer(java=False)
    scorer.tell()
    (record,) = caplog.records
    for told in ("no Java: METEOR and SPICE are left out", "BLEU, ROUGE-L and CIDEr", "own_tokens", "default-jre"):
        assert told in record.getMessage()
    metrics = scorer(CAPTIONS, REFERENCES)
    assert metrics == {f"{name}_own_tokens": value for name, value in plain_metrics(*tokens()).items()}
    assert scorer.best in metrics and scorer.quick(CAPTIONS, REFERENCES) == metrics


def test_a_java_that_only_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_java() and not CaptionScorer().java
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\necho get it >&2\nexit 1\n")
    stub.chmod(0o755)
    assert not has_java()
    stub.write_text("#!/bin/sh\nexit 0\n")
    assert has_java()
    with pytest.raises(ValueError, match="the tokenizer of pycocoevalcap failed with Java"):
        CaptionScorer()(CAPTIONS, REFERENCES)


def test_a_java_program_that_fails_is_left_out(monkeypatch, caplog):
    def fails(*_):
        raise ValueError("could not convert string to float: b''")

    monkeypatch.setattr(captioning_metrics, "public_tokens", own_tokens)
    monkeypatch.setattr(captioning_metrics, "_meteor", fails)
    assert "meteor" not in CaptionScorer(java=True)(CAPTIONS, REFERENCES)
    assert "METEOR is left out, since its Java program failed: could not convert" in caplog.text


def test_the_models_of_spice_are_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(captioning_metrics, "_folder", lambda part: tmp_path / part)
    assert not captioning_metrics.has_spice()
    (tmp_path / "spice/lib").mkdir(parents=True)
    (tmp_path / "spice/lib/stanford-corenlp-3.6.0.jar").touch()
    assert not captioning_metrics.has_spice()
    (tmp_path / "spice/lib/stanford-corenlp-3.6.0-models.jar").touch()
    assert captioning_metrics.has_spice()


def test_without_any_caption():
    with pytest.raises(ValueError, match="no caption to score"):
        CaptionScorer(java=False)({}, REFERENCES)


def test_without_the_package(monkeypatch):
    check_package()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pycocoevalcap, or give --skip_eval"):
        check_package()
    assert not captioning_metrics.has_spice()


def test_importing_needs_neither_java_nor_torch_nor_the_package():
    code = "import sys, datasets.tasks.captioning_metrics; assert not {'torch', 'pycocoevalcap'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})
