#!/usr/bin/env bash
# Trains a bundled model anew and puts it in its place: data/{xvlm,blip,vit,dit}_mini.safetensors and the log beside it.
#   scripts/pretrain_mini.sh [xvlm|blip|dino|dit]
# Half an hour (dino) to 75 minutes on two cores with bf16 matrix instructions: one trains, one draws images (dit needs
# one core alone, 50 minutes). Stopped, it goes on when it is started again. Then prints the quality of the model (the
# first row of each table), with the vendors that it was trained on and with the one that it was not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
model=${1:-xvlm}
case $model in
    xvlm | blip) bundled=${model}_mini configs=(prune_mini prune_mini_unseen) ;;
    dino) bundled=vit_mini configs=(prune_mini_seen prune_mini) ;;
    dit) bundled=dit_mini configs=(prune_mini) ;;
    *)
        echo "pretrain_mini.sh: there is no bundled model $model; there are xvlm, blip, dino and dit" >&2
        exit 2
        ;;
esac
output=output/${model}_mini
OMP_NUM_THREADS=1 "$python" pretrain.py -m "$model" --config "configs/$model/pretrain_mini.yaml" \
    --precision bf16-mixed --output_dir "$output"
cp "$output/$model.safetensors" "data/$bundled.safetensors"
cp "$output/log.csv" "data/${bundled}_log.csv"
for config in "${configs[@]}"; do
    "$python" prune.py -m "$model" -p omp --evaluate --config "configs/$model/$config.yaml" --output_dir "$output/$config"
done
