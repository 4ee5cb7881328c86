#!/usr/bin/env bash
# Sparse training on one's own data, from a folder of class folders and a captions.json that it draws itself: the
# bundled ViT, as a model of timm, is trained dense, pruned at 75 % and recovered in several ways, and the bundled XVLM
# learns the captions. Prints what each way is worth, which is in output/own_data/table.md too. Stopped, it goes on when
# it is started again.
# Hardware: 2 CPU cores. Time: at most 40 minutes with one seed.
#   --seeds 3  means over so many seeds       SEEDS="42 43"  these           SPARSITY=75  in per cent
#   EPOCHS=6  of the dense model              TUNED=4  of each other way     IMAGES=80  to train on, of each class
#   CAPTIONED=320  images with captions; 0: no XVLM   JOBS=2  runs at a time, on one core each
#   DEBUG=1  a few steps of each, in a folder of their own     OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/turns.sh
export python=${PYTHON:-python} output=${OUTPUT:-output/own_data${DEBUG:+_debug}} sparsity=${SPARSITY:-75} tuned=${TUNED:-4}
export epochs=${EPOCHS:-6} debug=${DEBUG:+--debug} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
captioned=${CAPTIONED:-320}
[ -z "${DEBUG:-}" ] || tuned=1 epochs=1
seeds=${SEEDS:-42}
case "$#:${1:-}:${2:-}" in
0::) ;;
2:--seeds:[1-9] | 2:--seeds:[1-9][0-9]) seeds=$(seq -s ' ' 42 $((41 + $2))) ;;
*)
    echo "scripts/own_data.sh: expected --seeds N, N from 1 to 99, got '$*'; other settings are variables, as SPARSITY=75" >&2
    exit 2
    ;;
esac
export images=$output/data/images captions=$output/data/captions.json
export mini=configs/external/image_classification_mini.yaml

mask() { # MODEL SEED
    find "$output/masks/$1/$2" -name '*_pruning_masks.safetensors' 2>/dev/null | head -n 1
}

run() { # KIND WAY SEED COMMAND...: <output>/runs/KIND/WAY/SEED gets what is printed, and the results
    local folder="$output/runs/$1/$2/$3" log="$output/logs/$1_$2_$3.log" name="$1, $2, seed $3"
    shift 3
    [ ! -f "$folder/result/README.md" ] || return 0 # what a run writes last
    mkdir -p "$folder" "$output/logs"
    # shellcheck disable=SC2086 # no option where it is empty
    if ! "$python" "$@" --output_dir "$folder" --precision 32-true $debug >>"$log" 2>&1; then
        tr '\r' '\n' <"$log" | tail -n 3 >&2
        exit 255 # xargs begins no other
    fi
    echo "$name: done in $SECONDS s"
}

prune() { # MODEL SEED NAME OPTIONS...: by magnitude over all weights, as --gradual does it
    local folder="$output/masks/$1/$2" seed=$2 model=$3
    [ -z "$(mask "$1" "$2")" ] || return 0
    shift 3
    mkdir -p "$output/logs"
    "$python" prune.py -m "$model" -p omp -s "$sparsity" --seed "$seed" --output_dir "$folder" "$@" \
        >"$output/logs/prune_${folder//\//_}.log" 2>&1
}

begin() { # SEED: the dense classifier, and its mask
    local seed=$1
    run images dense "$seed" image_classification.py --model timm:vit_mini --pretrained --dense \
        --dataset "$images" --config "$mini" --epochs "$epochs" --seed "$seed"
    prune images "$seed" "timm:local-dir:$output/runs/images/dense/$seed/result"
}

image_way() { # WAY SEED
    local seed=$2 kind=(--mask "$(mask images "$2")") count=$tuned
    case $1 in
    one_shot) count=0 ;;
    plain) ;;
    distilled) kind+=(--distill 0.5) ;;
    lora) kind+=(--lora 16) ;;
    gradual) kind=(--dense --gradual "$sparsity") ;;
    gradual_distilled) kind=(--dense --gradual "$sparsity" --distill 0.5) ;;
    esac
    run images "$1" "$seed" image_classification.py --model "timm:local-dir:$output/runs/images/dense/$seed/result" \
        "${kind[@]}" --dataset "$images" --config "$mini" --epochs "$count" --seed "$seed"
}

caption_way() { # WAY SEED
    local seed=$2 kind=(--mask "$(mask captions "$2")")
    case $1 in
    dense) kind=(--dense) ;;
    plain) ;;
    distilled) kind+=(--distill 0.5) ;;
    gradual) kind=(--dense --gradual "$sparsity") ;;
    esac
    run captions "$1" "$seed" retrieval.py --model xvlm --variant mini "${kind[@]}" --data "$captions" --epochs 2 \
        --batch_size 32 --seed "$seed"
}

export -f mask run prune begin image_way caption_way
mkdir -p "$output/data"
settings="SPARSITY=$sparsity EPOCHS=$epochs TUNED=$tuned IMAGES=${IMAGES:-80} CAPTIONED=$captioned DEBUG=${DEBUG:-}"
if [ -f "$output/settings" ] && [ "$(cat "$output/settings")" != "$settings" ]; then
    echo "scripts/own_data.sh: $output is of $(cat "$output/settings"), not of $settings: choose another OUTPUT" >&2
    exit 2
fi
echo "$settings" >"$output/settings"
if [ ! -f "$output/data/done" ]; then
    "$python" -c '
import sys
from datasets.bundled.own_style import write_own_data
write_own_data(sys.argv[1], train=int(sys.argv[2]), val=60, captioned=int(sys.argv[3]))' "$output/data" \
        "${IMAGES:-80}" "$captioned"
    touch "$output/data/done"
fi
tr ' ' '\n' <<<"$seeds" | turns begin
for seed in $seeds; do
    for way in one_shot plain distilled lora gradual gradual_distilled; do
        echo "$way $seed"
    done
done | turns image_way
if [ "$captioned" != 0 ]; then
    for seed in $seeds; do
        prune captions "$seed" xvlm --variant mini
    done
    for seed in $seeds; do
        for way in dense plain distilled gradual; do
            echo "$way $seed"
        done
    done | turns caption_way
fi
"$python" -c '
import sys
from pathlib import Path
from engine.finished.finetuning_table import write_ways
print(write_ways(Path(sys.argv[1]))[1])' "$output"
