#!/usr/bin/env bash
# Prunes the bundled models once with MULTIFLOW, fine-tunes them at each sparsity and dense for every task, and prints
# what they can do, which is in output/finetune_mini/table.md too. Stopped, it goes on when it is started again.
#   RUNS="xvlm_retrieval xvlm_vqa"  only these       SPARSITIES=63,75,90  in per cent      BATCHES=200  to prune with
#   JOBS=2  runs at a time, on one core each         DEBUG=1  a few steps of each          OUTPUT, CONFIGS, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export python=${PYTHON:-python} output=${OUTPUT:-output/finetune_mini} configs=${CONFIGS:-configs}
export debug=${DEBUG:+--debug} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
sparsities=${SPARSITIES:-63,75,90}
batches=${DEBUG:+2}
batches=${batches:-${BATCHES:-200}}
runs=${RUNS:-xvlm_retrieval xvlm_captioning xvlm_vqa blip_retrieval blip_captioning blip_vqa dino_image_classification}

mask() { # MODEL SPARSITY
    echo "$output/masks/multiflow/$1_multiflow_$2_seed42_pruning_masks.safetensors"
}

prune() { # MODEL
    for sparsity in ${sparsities//,/ }; do
        if [ ! -f "$(mask "$1" "$sparsity")" ]; then
            echo "$1: prune"
            "$python" prune.py -m "$1" -p multiflow -s "$sparsities" --config "$configs/$1/prune_mini.yaml" \
                --num_batches "$batches" --output_dir "$output/masks" >"$output/prune_$1.log"
            return
        fi
    done
}

tune() { # RUN LEVEL: a run is <model>_<task>; a level is "dense" or a sparsity
    local model=${1%%_*} task=${1#*_} folder="$output/$1/$2" log="$output/$1/$2.log" trained=(--dense)
    if [ -f "$folder/result/README.md" ]; then # what a run writes last
        return
    fi
    [ "$2" = dense ] || trained=(--mask "$(mask "$model" "$2")")
    echo "$1, $2: begins, see $log"
    mkdir -p "$folder"
    # shellcheck disable=SC2086 # no option where it is empty
    if ! "$python" "$task.py" --model "$model" "${trained[@]}" --config "$configs/$model/${task}_mini.yaml" \
        --output_dir "$folder" $debug >>"$log" 2>&1; then
        tr '\r' '\n' <"$log" | tail -n 3 >&2
        exit 255 # xargs begins no other
    fi
    echo "$1, $2: done in $SECONDS s"
}

export -f mask tune
mkdir -p "$output"
for run in $runs; do
    prune "${run%%_*}"
done
for run in $runs; do
    for level in dense ${sparsities//,/ }; do
        echo "$run $level"
    done
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'tune "$@"' bash || {
    echo "scripts/finetune_mini.sh: stopped; the same command goes on from here" >&2
    exit 1
}
"$python" compare.py --finetuned "$output" --metrics 'txt_r1,img_r1,bleu_4*,cider*,accuracy,top1'
