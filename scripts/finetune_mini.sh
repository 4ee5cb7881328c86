#!/usr/bin/env bash
# Prunes the bundled models once with MULTIFLOW, fine-tunes them at each sparsity and dense for every task, and prints
# what they can do, which is in output/finetune_mini/table.md too. Stopped, it goes on when it is started again.
#   RUNS="xvlm_retrieval xvlm_vqa"  only these         SPARSITIES=63,75,90  in per cent        BATCHES=200  to prune with
#   OUTPUT, CONFIGS, PYTHON         other folders, another interpreter       DEBUG=1  a few steps of each, to see it run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
output=${OUTPUT:-output/finetune_mini}
configs=${CONFIGS:-configs}
sparsities=${SPARSITIES:-63,75,90}
batches=${BATCHES:-200}
runs=${RUNS:-xvlm_retrieval xvlm_captioning xvlm_vqa blip_retrieval blip_captioning blip_vqa dino_image_classification}
debug=()
if [ -n "${DEBUG:-}" ]; then
    debug=(--debug)
    batches=2
fi

mask() { # MODEL SPARSITY
    echo "$output/masks/multiflow/$1_multiflow_$2_seed42_pruning_masks.safetensors"
}

prune() { # MODEL
    for sparsity in ${sparsities//,/ }; do
        if [ ! -f "$(mask "$1" "$sparsity")" ]; then
            echo "== $1: prune"
            "$python" prune.py -m "$1" -p multiflow -s "$sparsities" --config "$configs/$1/prune_mini.yaml" \
                --num_batches "$batches" --output_dir "$output/masks"
            return
        fi
    done
}

tune() { # MODEL TASK LEVEL OPTION...: the options say what is trained; the model card is written last
    local folder="$output/$1_$2/$3"
    if [ -f "$folder/result/README.md" ]; then
        return
    fi
    echo "== $1: $2, $3"
    "$python" "$2.py" --model "$1" "${@:4}" --config "$configs/$1/$2_mini.yaml" --output_dir "$folder" \
        ${debug[@]+"${debug[@]}"}
}

for run in $runs; do
    model=${run%%_*} task=${run#*_}
    prune "$model"
    tune "$model" "$task" dense --dense
    for sparsity in ${sparsities//,/ }; do
        tune "$model" "$task" "$sparsity" --mask "$(mask "$model" "$sparsity")"
    done
done
"$python" finetuning_table.py "$output" --metrics 'txt_r1,img_r1,bleu_4*,cider*,accuracy,top1'
