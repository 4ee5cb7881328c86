#!/usr/bin/env bash
# Measures the records of docs/results.md: the best quality that is known of each bundled model at 2:4, 50, 63, 75 and
# 90 %, one-shot and after recovery without labels, beside the dense model and its weights in 8 bits: at most two hours on
# two cores. The table is in output/records/table.md. Stopped, it goes on when it is started again. A new record is a
# change of `plan` below, with the new table and the log of its run.
#   scripts/records.sh [OPTION ...]      options of prune.py for all runs, such as --accelerator cpu
#   MODELS="dino xvlm blip"  LEVELS=50,63,75,90,2:4     only these      STEPS=200  of recovery
#   JOBS=2  runs at a time, on one core each     DEBUG=1  two batches, three steps, 75 %     OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} output=${OUTPUT:-output/records} DEBUG=${DEBUG:-} more="$*"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive steps=${DEBUG:+3}
export steps=${steps:-${STEPS:-200}}
. scripts/turns.sh
levels=${LEVELS:-50,63,75,90,2:4} # the longest first
[ -z "$DEBUG" ] || levels=75
every="xvlm blip dino" # the longest first, too
models=${MODELS:-$every}

plan() { # MODEL LEVEL: the options of prune.py that give the best quality known
    case $1,$2 in
        dino,*) echo "-p best --recover_lr 1e-3" ;;
        *) echo "-p best --recover_lr 1e-4" ;;
    esac
}

run() { # MODEL LEVELS of one plan, or MODEL int8
    local folder="$output/$1/${2/:/of}" batches=64 command
    [ "$1" != dino ] || batches=32 # of 16 images: 512, as 64 of 8 scenes
    [ -z "$DEBUG" ] || batches=2
    # shellcheck disable=SC2206,SC2207 # several words
    case $2 in
        int8) command=(compare.py -m "$1" -p rand -s 50 --seeds 42 --int8) ;;
        *:*) command=(prune.py -m "$1" $(plan "$@") --pattern "$2") ;;
        *) command=(prune.py -m "$1" $(plan "$1" "${2%%,*}") -s "$2") ;;
    esac
    if [ "$2" != int8 ]; then
        command+=(--num_batches "$batches" --recover "$steps" --evaluate)
        mkdir -p "$folder"
        echo "python ${command[*]}" >"$folder/command"
        # shellcheck disable=SC2206 # several words
        command+=($more)
    elif [ "$1" != dino ]; then
        command+=(--k_test 8) # as prune.py evaluates
    fi
    once "$folder" "${command[@]}" --output_dir "$folder"
}

wanted() { # what is to be run: MODEL LEVELS, a line each; sparsities of one plan share their calibration
    local model level given before together
    for model in $models; do
        before="" together=""
        for level in ${levels//,/ } int8; do
            given=$(plan "$model" "$level")
            if [ "$given" = "$before" ] && [[ $level != *:* && $level != int8 ]]; then
                together+=",$level"
                continue
            fi
            [ -z "$together" ] || echo "$model $together"
            before="" together=$level
            [[ $level == *:* ]] || before=$given
        done
        echo "$model $together"
    done
}

for model in $models; do
    # shellcheck disable=SC2086 # several words
    known "$model" $every
done
mkdir -p "$output"
export -f run plan
wanted | turns run
"$PYTHON" compare.py --records "$output"
