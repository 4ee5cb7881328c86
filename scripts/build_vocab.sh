#!/usr/bin/env bash
# Writes data/vocab/mini_vocab.txt: 2,048 entries of data/vocab/bert_vocab.txt that write every caption of the bundled set.
# Usage: scripts/build_vocab.sh [CONCEPTS.json]     (default data/bundled/concepts.json: {"concepts": [{"name", ...}]})
# The bundled models are trained with this vocabulary: after a change they have to be trained again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python}" - "${1:-data/bundled/concepts.json}" <<'PY'
import json
import sys
from pathlib import Path

from datasets.text import clean_caption
from models.parts.tokenizer import WordPiece, slice_vocab

FIELDS = ("name", "category", "subcategory")
vocab = Path("data/vocab")
concepts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["concepts"]
texts = [concept[field] for concept in concepts for field in FIELDS]
texts += (vocab / "mini_words.txt").read_text(encoding="utf-8").splitlines()
full = WordPiece(vocab / "bert_vocab.txt")
tokens = slice_vocab(full, [clean_caption(text, len(text)) for text in texts], size=2048)
(vocab / "mini_vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
PY
