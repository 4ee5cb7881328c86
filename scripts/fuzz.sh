#!/usr/bin/env bash
# Damage more than 300 files of each format, and print what came of them: refused in one line, or loaded right. About ten
# minutes on one core; exit code 0 where nothing is wrong.   scripts/fuzz.sh [options of pytest, such as -k masks]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python
HYPOTHESIS_PROFILE=full OMP_NUM_THREADS=1 exec "${PYTHON:-$python}" -m pytest tests/fuzz --runxfail "$@"
