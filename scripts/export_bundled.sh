#!/usr/bin/env bash
# Writes the bundled scenes as image files and annotations in the public layouts (COCO, VG, CC3M, SBU) under a folder:
#   scripts/export_bundled.sh FOLDER [N] [SIDE]     N: images of each kind, default 1000; SIDE: pixels, default 224
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: scripts/export_bundled.sh FOLDER [N] [SIDE]" >&2
    exit 2
fi
case ${2:-1000}${3:-224} in
*[!0-9]*)
    echo "scripts/export_bundled.sh: N and SIDE must be whole numbers, got ${2:-1000} and ${3:-224}" >&2
    exit 2
    ;;
esac
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
"${PYTHON:-python}" - "$folder" "${2:-1000}" "${3:-224}" <<'PY'
import sys

from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs

try:
    files = export_public(sys.argv[1], int(sys.argv[2]), load_glyphs(), side=int(sys.argv[3]))
except (FileNotFoundError, ValueError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print(*files, sep="\n")
PY
