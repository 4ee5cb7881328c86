#!/usr/bin/env bash
# Trains the bundled xvlm-mini anew and puts it in its place: data/xvlm_mini.safetensors and data/xvlm_mini_log.csv.
# About 75 minutes on two cores with bf16 matrix instructions: one trains, one draws scenes. Stopped, it goes on when
# it is started again. Then prints its retrieval, on scenes and on the vendor that it was never trained on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
output=output/xvlm_mini
OMP_NUM_THREADS=1 "$python" pretrain.py -m xvlm --config configs/xvlm/pretrain_mini.yaml --precision bf16-mixed \
    --output_dir "$output"
cp "$output/xvlm.safetensors" data/xvlm_mini.safetensors
cp "$output/log.csv" data/xvlm_mini_log.csv
for config in prune_mini prune_mini_unseen; do
    "$python" prune.py -m xvlm -p omp --evaluate --config "configs/xvlm/$config.yaml" --output_dir "$output/$config"
done
