#!/usr/bin/env bash
# Compares the masks of this checkout with those of another revision: every pruner on the bundled models, on one machine.
#   scripts/compare_masks.sh REV [PRUNER ...]
# Both sides run at the same time, one thread each; about 20 minutes on 2 cores for all pruners. It prints the digest of
# each mask file on both sides, and exits with 1 where one differs or is missing.
#   PYTHON=python  OUTPUT=output/compare_masks  MODELS="xvlm blip dino"  BATCHES=4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 1 ] || ! revision=$(git rev-parse --verify --quiet "$1^{commit}"); then
    echo "compare_masks.sh: expected a revision of this repository: scripts/compare_masks.sh REV [PRUNER ...]" >&2
    exit 2
fi
shift
here=$PWD python=$(realpath -s "$(command -v "${PYTHON:-python}")") output=$(realpath -m "${OUTPUT:-output/compare_masks}")
models=${MODELS:-xvlm blip dino} batches=${BATCHES:-4}
there=$output/checkout
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
trap 'git worktree remove --force "$there" 2> /dev/null || true' EXIT
rm -rf "$output"
mkdir -p "$output"
git worktree prune
git worktree add --quiet --detach "$there" "$revision"
pruners=("$@")
[ $# -gt 0 ] || mapfile -t pruners < <("$python" -c 'import pruners; print(*pruners.available(), sep="\n")')

prune() { # side, checkout
    cd "$2"
    for pruner in "${pruners[@]}"; do
        steps=()
        case $pruner in itersnip | chita) steps=(--epochs 2) ;; esac
        for model in $models; do
            run "$1" "$model-$pruner" -m "$model" -p "$pruner" -s 63,75 "${steps[@]}"
            case $pruner in magnitude | wanda | sparsegpt | multiflow)
                run "$1" "$model-$pruner-2of4" -m "$model" -p "$pruner" --pattern 2:4
                ;;
            esac
        done
    done
}

run() { # side, name, arguments of prune.py
    local folder=$output/$1/$2 log=$output/$1/$2.log
    mkdir -p "$folder"
    "$python" prune.py "${@:3}" --num_batches "$batches" --accelerator cpu --output_dir "$folder" > "$log" 2>&1 ||
        echo "$1: $2 failed: $(tail -n 1 "$log")" >&2
}

prune there "$there" &
(prune here "$here")
wait

"$python" - "$output" << 'PYTHON'
import json, sys
from pathlib import Path
from safetensors import safe_open

output = Path(sys.argv[1])

def digests(side):
    found = {}
    for path in sorted((output / side).rglob("*_pruning_masks.safetensors")):
        with safe_open(path, "pt") as file:
            found[str(path.relative_to(output / side))] = json.loads(file.metadata()["sparsity"])["digest"]
    return found

here, there = digests("here"), digests("there")
names = sorted({*here, *there})
equal = [name for name in names if here.get(name) == there.get(name)]
for name in names:
    print("equal  " if name in equal else "DIFFERS", here.get(name, "missing")[:16], there.get(name, "missing")[:16], name)
print(f"{len(equal)} of {len(names)} mask files are equal")
sys.exit(0 if names and len(equal) == len(names) else 1)
PYTHON
