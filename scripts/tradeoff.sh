#!/usr/bin/env bash
# Measures what is left of the quality of vit-mini and xvlm-mini beside what they save of their bytes and their time: the
# best plan at 75 and 90 %, anywhere and in blocks of 4 x 4, and at 2:4, each with sparse kernels and as int8, beside the
# dense model and its int8: at most three hours on two cores. The table is in output/tradeoff/table.md. Stopped, it goes
# on when it is started again: what is done is not done twice. Folders of several machines may be put together, each
# with its own MODELS or SEEDS; `python compare.py --tradeoff FOLDER` writes their table.
#   scripts/tradeoff.sh [OPTION ...]      options of prune.py and benchmark.py for all runs, such as --accelerator cpu
#   MODELS="xvlm dino"  LEVELS=75,90  PATTERNS="none block4x4 2:4"  SEEDS=42,43,44     only these
#   PLAN="best"  or another plan, such as "wanda --reconstruct sparsegpt"
#   CLOCK=cpu  time of the process, which others on the machine change little; or wall    THREADS=1    ROUNDS=21
#   JOBS=2  runs at a time, on one core each     DEBUG=1  two batches, 75 %, one seed     OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} output=${OUTPUT:-output/tradeoff} DEBUG=${DEBUG:-} more="$*"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
export plan=${PLAN:-best} clock=${CLOCK:-cpu} threads=${THREADS:-1} rounds=${ROUNDS:-21}
export levels=${LEVELS:-75,90} seeds=${SEEDS:-42,43,44}
[ -z "$DEBUG" ] || levels=75 seeds=42 rounds=3
. scripts/turns.sh
every="xvlm dino" # the longest first
models=${MODELS:-$every} patterns=${PATTERNS:-none block4x4 2:4}

run() { # MODEL PATTERN SEED: prunes at all levels of a pattern under one seed, and measures each
    local model=$1 pattern=$2 seed=$3 batches=64 targets labels label mask command
    local folder="$output/$model/pruned_${pattern/:/of}/$seed"
    [ "$model" != dino ] || batches=32 # of 16 images: 512, as 64 of 8 scenes
    [ -z "$DEBUG" ] || batches=2
    case $pattern in
        none) targets=(-s "$levels") labels=${levels//,/ } ;;
        *:*) targets=(--pattern "$pattern") labels=${pattern/:/of} ;;
        *) targets=(--pattern "$pattern" -s "$levels") labels="${pattern}_${levels//,/ ${pattern}_}" ;;
    esac
    # shellcheck disable=SC2206 # several words
    command=(prune.py -m "$model" -p $plan "${targets[@]}" --num_batches "$batches" --seed "$seed")
    # shellcheck disable=SC2086 # several words
    once "$folder" "${command[@]}" --output_dir "$folder" $more
    for label in $labels; do
        mask=$(echo "$folder"/*/*_"${label}_seed${seed}"_pruning_masks.safetensors)
        command=(benchmark.py -m "$model" --mask "$mask" --variants dense,packed,accelerated,int8 --batch_sizes 1,8)
        command+=(--rounds "$rounds" --clock "$clock" --threads "$threads" --evaluate)
        # shellcheck disable=SC2086 # several words
        once "$output/$model/$label/$seed" "${command[@]}" --output_dir "$output/$model/$label/$seed" $more
    done
}

for model in $models; do
    # shellcheck disable=SC2086 # several words
    known "$model" $every
done
mkdir -p "$output"
export -f run
for seed in ${seeds//,/ }; do
    for model in $models; do
        for pattern in $patterns; do
            echo "$model $pattern $seed"
        done
    done
done | turns run
"$PYTHON" compare.py --tradeoff "$output"
