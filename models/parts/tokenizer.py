"""BERT's WordPiece tokenizer over a vocabulary file (by the `tokenizers` library), and small vocabularies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from sparsity.errors import MissingFileError, UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece:
    """Uncased WordPiece tokenizer (Devlin et al., arXiv 1810.04805); ids come without special tokens.

    Args:
        vocab_path: text file with one token a line (the line number is the id), as `data/vocab/bert_vocab.txt`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a special token is missing from it.
    """

    def __init__(self, vocab_path: str | Path):
        tokens = read_vocab(vocab_path)
        missing = [token for token in SPECIAL_TOKENS if token not in tokens]
        if missing:
            raise UserError(f"{vocab_path}: no {', '.join(missing)} in this vocabulary; one token a line is expected")
        self._tokenizer = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(self.token_to_id, SPECIAL_TOKENS)
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: special tokens left out, word pieces joined."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def id_to_token(self, i: int) -> str:
        """Token of an id; raises UserError outside the vocabulary."""
        token = self._tokenizer.id_to_token(i)
        if token is None:
            raise UserError(f"a token id must be between 0 and {self.vocab_size - 1}, got {i!r}")
        return token

    def token_to_id(self, token: str) -> int:
        """Id of a token; raises UserError where the vocabulary has no such token."""
        i = self._tokenizer.token_to_id(token)
        if i is None:
            raise UserError(f"the vocabulary has no token {token!r}")
        return i


def read_vocab(path: str | Path) -> list[str]:
    """Tokens of a vocabulary file, in the order of their ids."""
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: vocabulary file not found; the repository has data/vocab/bert_vocab.txt")
    tokens = Path(path).read_text(encoding="utf-8").split("\n")
    tokens = tokens[:-1] if tokens[-1] == "" else tokens
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: a token stands there twice; one token a line, each once, is expected")
    return tokens


def slice_vocab(full: WordPiece, texts: Iterable[str], size: int) -> list[str]:
    """Tokens of a small vocabulary that writes `texts` with the same word pieces as the full one.

    Special tokens come first ([PAD] = 0), then single characters with and without ##, then the pieces of `texts`, then
    the most frequent (lowest-id) whole words of the full vocabulary up to `size` entries.
    """
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    kept = dict.fromkeys([*SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)])
    kept.update(dict.fromkeys(full.id_to_token(i) for i in sorted({i for text in texts for i in full.encode(text)})))
    if len(kept) > size:
        raise UserError(f"size must be at least {len(kept)} to hold the tokens of these texts, got {size!r}")
    for i in range(full.vocab_size):
        if len(kept) == size:
            break
        token = full.id_to_token(i)
        if token.isascii() and token.isalpha() and len(token) > 1:
            kept[token] = None
    return list(kept)
