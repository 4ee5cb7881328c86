#!/usr/bin/env bash
# Fine-tunes the bundled xvlm-mini, pruned by magnitude, for retrieval in bf16-mixed and in 32-true with each of three
# seeds, and prints the recalls, which must agree within noise: else it ends with 1. About six minutes on two free CPU
# cores. Stopped, it goes on when it is started again.
#   SEEDS="1 2 3"   SPARSITY=75   DEBUG=1  a few steps of each   CONFIG, OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} output=${OUTPUT:-output/precision} config=${CONFIG:-configs/xvlm/retrieval_short.yaml}
seeds=${SEEDS:-1 2 3} sparsity=${SPARSITY:-75}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
mask=$output/masks/omp/xvlm_omp_${sparsity}_seed42_pruning_masks.safetensors

if [ ! -f "$mask" ]; then
    mkdir -p "$output"
    "$python" prune.py -m xvlm -p omp -s "$sparsity" --variant mini --output_dir "$output/masks" >"$output/prune.log" 2>&1
fi

tune() { # PRECISION: all seeds, one after the other
    for seed in $seeds; do
        local folder="$output/$1/$seed"
        [ -f "$folder/result/README.md" ] && continue # what a run writes last
        mkdir -p "$folder"
        "$python" retrieval.py --model xvlm --mask "$mask" --config "$config" --precision "$1" --seed "$seed" \
            --output_dir "$folder" ${DEBUG:+--debug} >"$folder/log.txt" 2>&1
    done
}

tune bf16-mixed &
pid=$!
tune 32-true
wait "$pid"

# shellcheck disable=SC2086 # a word for each seed
"$python" - "$output" $seeds <<'PYTHON'
import json
import statistics
import sys
from pathlib import Path

output, seeds = Path(sys.argv[1]), sys.argv[2:]
agree = True
for recall in ("txt_r1", "img_r1", "r_mean"):
    found = {}
    for precision in ("bf16-mixed", "32-true"):
        files = [output / precision / seed / "result" / "metrics.json" for seed in seeds]
        found[precision] = [next(iter(json.loads(file.read_text()).values()))[recall] for file in files]
        values = ", ".join(f"{value:.1f}" for value in found[precision])
        print(f"{recall:7s} {precision:11s} {values}: mean {statistics.mean(found[precision]):.1f}")
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    mean = statistics.mean(differences)
    # Two standard errors of the mean of the seeds' spread, but at least 2 points: recalls of 400 images are that coarse.
    spread = max(map(statistics.pstdev, found.values()))
    noise = max(2.0, 2 * spread * (2 / len(seeds)) ** 0.5)
    agree &= abs(mean) <= noise
    print(f"{recall:7s} difference  {mean:+.2f}, noise {noise:.2f}: {'within' if abs(mean) <= noise else 'beyond'}")
sys.exit(not agree)
PYTHON
