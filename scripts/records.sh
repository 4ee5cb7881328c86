#!/usr/bin/env bash
# Measures the records of docs/results.md: the best quality that is known of each bundled model at 2:4, 50, 63, 75 and
# 90 %, one-shot and after recovery without labels, beside the dense model and its weights in 8 bits: at most two hours on
# two cores. The table is in output/records/table.md. Stopped, it goes on when it is started again. A new record is a
# change of `plan` below, with the new table and the log of its run.
#   scripts/records.sh [OPTION ...]      options of prune.py for all runs, such as --accelerator cpu
#   MODELS="dino xvlm blip"  LEVELS=2:4,50,63,75,90     only these      STEPS=300  of recovery
#   JOBS=2  runs at a time, on one core each     DEBUG=1  two batches, three steps, 75 %     OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} output=${OUTPUT:-output/records} DEBUG=${DEBUG:-} more="$*"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive steps=${DEBUG:+3}
export steps=${steps:-${STEPS:-300}}
levels=${LEVELS:-2:4,50,63,75,90}
[ -z "$DEBUG" ] || levels=75
known="xvlm blip dino" # the longest first
models=${MODELS:-$known}

plan() { # MODEL LEVEL: the options of prune.py that give the best quality known
    case $1,$2 in
        *) echo "-p best" ;;
    esac
}

run() { # MODEL LEVEL, or MODEL int8
    local folder="$output/$1/${2/:/of}" batches=64 command
    [ "$1" != dino ] || batches=32 # of 16 images: 512, as 64 of 8 scenes
    [ -z "$DEBUG" ] || batches=2
    if [ -e "$folder/done" ]; then
        return
    fi
    mkdir -p "$folder"
    # shellcheck disable=SC2206,SC2207 # several words
    case $2 in
        int8) command=(compare.py -m "$1" -p rand -s 50 --seeds 42 --int8 --output_dir "$folder") ;;
        *:*) command=(prune.py -m "$1" $(plan "$@") --pattern "$2") ;;
        *) command=(prune.py -m "$1" $(plan "$@") -s "$2") ;;
    esac
    if [ "$2" != int8 ]; then
        command+=(--num_batches "$batches" --recover "$steps" --evaluate)
        echo "python ${command[*]}" >"$folder/command"
        # shellcheck disable=SC2206 # several words
        command+=(--output_dir "$folder" $more)
    elif [ "$1" != dino ]; then
        command+=(--k_test 8) # as prune.py evaluates
    fi
    if ! "$PYTHON" "${command[@]}" >>"$folder/log" 2>&1; then
        tr '\r' '\n' <"$folder/log" | tail -n 3 >&2
        exit 255 # xargs begins no other
    fi
    touch "$folder/done"
    echo "$1, $2: done in $SECONDS s"
}

for model in $models; do
    if [[ " $known " != *" $model "* ]]; then
        echo "scripts/records.sh: there is no model $model; there are: $known" >&2
        exit 2
    fi
done
mkdir -p "$output"
export -f run plan
for model in $models; do
    for level in ${levels//,/ } int8; do
        echo "$model $level"
    done
done | xargs -r -P "${JOBS:-2}" -L 1 bash -c 'set -euo pipefail; run "$@"' bash || {
    echo "scripts/records.sh: stopped, see the logs in $output; the same command goes on from here" >&2
    exit 1
}
"$PYTHON" compare.py --records "$output"
