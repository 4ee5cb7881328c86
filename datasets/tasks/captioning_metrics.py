"""Metrics of captions, computed by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

The public tokenizer, METEOR and SPICE are Java programs. Without Java the others are computed on a tokenisation of our
own, which their names say: their values are not comparable with published ones.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparsity.errors import UserError

log = logging.getLogger(__name__)

PACKAGE = "pycocoevalcap"
OWN_TOKENS = "_own_tokens"  # ends the names of metrics that the public tokenizer has no part in
HOW_TO_GET = "install a Java runtime (Debian: apt install default-jre)"
Tokens = dict[int, list[str]]  # image -> captions, their tokens separated by spaces
_TOKENIZER = ("java", "-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
_WORD = re.compile(r"\w+(?:['-]\w+)*")


def check_package() -> None:
    """Raise UserError where pycocoevalcap is not installed; does not import it."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(f"captions are scored by {PACKAGE}: pip install {PACKAGE}, or give --skip_eval")


def has_java() -> bool:
    """Whether Java programs run: some systems have a `java` that only says how to get one."""
    return bool(shutil.which("java")) and _succeeds(["java", "-version"])


def has_spice() -> bool:
    """Whether the models of SPICE are there, which its package would fetch from the net; it writes beside them."""
    if importlib.util.find_spec(PACKAGE) is None:
        return False
    folder = _folder("spice")
    jars = [folder / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    return all(jar.is_file() for jar in jars) and os.access(folder, os.W_OK)


class CaptionScorer:
    """Metrics in per cent: `bleu_1` to `bleu_4`, `rouge_l` and `cider`, with Java `meteor`, and `spice` where it is.

    java: whether it is used, by default where it runs.
    """

    def __init__(self, java: bool | None = None):
        self.java = has_java() if java is None else java
        self.spice = self.java and has_spice()

    def tell(self) -> None:
        """Log what is left out and why."""
        if not self.java:
            log.info(
                "no Java: METEOR and SPICE are left out, and BLEU, ROUGE-L and CIDEr are computed on tokens of our own "
                "(*%s), not comparable with published values; %s",
                OWN_TOKENS,
                HOW_TO_GET,
            )
        elif not self.spice:
            log.info("SPICE is left out: its models are not in %s", Path(PACKAGE, "spice", "lib"))

    @property
    def suffix(self) -> str:
        """Return what the names of the metrics end with."""
        return "" if self.java else OWN_TOKENS

    @property
    def best(self) -> str:
        """The metric by which weights are chosen."""
        return f"cider{self.suffix}"

    def __call__(self, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
        """All metrics of one caption for each image, compared with the references of the same images."""
        found, expected = self._tokens(captions, references)
        metrics = self._named(plain_metrics(found, expected))
        if self.java:
            metrics |= _by_java("METEOR", lambda: _meteor(found, expected))
        if self.spice:
            metrics |= _by_java("SPICE", lambda: _spice(found, expected))
        return metrics

    def quick(self, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
        """The same without METEOR and SPICE, which take a minute and more."""
        return self._named(plain_metrics(*self._tokens(captions, references)))

    def _tokens(self, captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> tuple[Tokens, Tokens]:
        if not captions:
            raise UserError("there is no caption to score")
        tokenize = public_tokens if self.java else own_tokens
        found = tokenize({image: [text] for image, text in captions.items()})
        return found, tokenize({image: references[image] for image in captions})

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {f"{name}{self.suffix}": value for name, value in metrics.items()}


def own_tokens(texts: Mapping[int, Sequence[str]]) -> Tokens:
    """Lower-case words without punctuation."""
    return {image: [" ".join(_WORD.findall(text.lower())) for text in own] for image, own in texts.items()}


def public_tokens(texts: Mapping[int, Sequence[str]]) -> Tokens:
    """Tokens of the Penn Treebank, lower-case, without punctuation: Stanford's tokenizer as COCO's evaluation has it.

    UserError where it fails.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [" ".join(text.split()) for own in texts.values() for text in own]
    # Through pipes: the package's own class writes a file beside its code, where not every user may write.
    command = [*_TOKENIZER, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    written = "".join(f"{line}\n" for line in lines).encode()
    done = subprocess.run(command, cwd=_folder("tokenizer"), input=written, capture_output=True)
    tokenized = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(tokenized) != len(lines):
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"the tokenizer of {PACKAGE} failed with Java: {reason}; give --skip_eval to score elsewhere")
    words = (" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in tokenized)
    return {image: [next(words) for _ in own] for image, own in texts.items()}


def plain_metrics(captions: Tokens, references: Tokens) -> dict[str, float]:
    """BLEU, ROUGE-L and CIDEr, in per cent, which need no Java."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(references, captions, verbose=0)
    values = {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
    values |= {"rouge_l": Rouge().compute_score(references, captions)[0]}
    values |= {"cider": Cider().compute_score(references, captions)[0]}
    return {name: 100 * float(value) for name, value in values.items()}


def _meteor(captions: Tokens, references: Tokens) -> dict[str, float]:
    from pycocoevalcap.meteor.meteor import Meteor

    return {"meteor": 100 * float(Meteor().compute_score(references, captions)[0])}


def _spice(captions: Tokens, references: Tokens) -> dict[str, float]:
    from pycocoevalcap.spice.spice import Spice

    return {"spice": 100 * float(Spice().compute_score(references, captions)[0])}


def _by_java(name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what `compute` gives; nothing, and a warning, where the Java program fails: it needs gigabytes of RAM."""
    try:
        return compute()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning("%s is left out, since its Java program failed: %s", name, " ".join(str(error).split()))
        return {}


def _folder(part: str) -> Path:
    """Return the folder of a part of pycocoevalcap, which is not imported."""
    return Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0], part)


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
