#!/usr/bin/env bash
# Prunes the bundled classifier to 2:4 with every method, learns masks from each prior, short and long, and prints what
# each can do on images of a vendor that training never shows, which is in output/nm_table/results/table.md too: at most
# 90 minutes on two cores. Stopped, it goes on when it is started again.
#   SEEDS="0 1 2"  METHODS="dense wanda"  only these      JOBS=2  at a time, on one core each
#   DEBUG=1  a few steps and images                      OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} output=${OUTPUT:-output/nm_table} DEBUG=${DEBUG:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive model=vit_mini EMA=${EMA:-0.99}
seeds=${SEEDS:-0 1 2}
export first=${seeds%% *} samples=${DEBUG:+4}
export samples=${samples:-512}
methods=${METHODS:-dense magnitude wanda sparsegpt_updated sparsegpt maskllm_short_sparsegpt maskllm_short_magnitude
    maskllm_long_sparsegpt maskllm_long_magnitude}

pruned() { # PRUNER SEED [OPTION]: makes the checkpoint that it prints
    local file="$output/seed$2/pruned/$model.${1}24${3:+_updated}.pt"
    if [ "$1" = magnitude ] && [ "$2" != "$first" ]; then # nothing is drawn
        file=$(pruned magnitude "$first")
        mkdir -p "$output/seed$2/pruned"
        cp "$file" "$output/seed$2/pruned"
    elif [ ! -f "$file" ]; then
        mkdir -p "$output/seed$2"
        "$PYTHON" oneshot_pruning_timm.py --model $model --pruner "$1" --nsamples "$samples" --seed "$2" --skip-eval \
            ${3:+"$3"} --save-model "$file" >>"$output/seed$2/prune_$1.log" 2>&1
    fi
    echo "$file"
}

measure() { # RESULT OPTIONS of timm_validate.py
    "$PYTHON" timm_validate.py --model $model "${@:2}" >"$1.part" 2>>"$output/log"
    mv "$1.part" "$1"
}

method() { # METHOD SEED
    local result="$output/results/$1/$2.json" length prior
    if [ -f "$result" ]; then
        return
    fi
    mkdir -p "$output/results/$1" "$output/seed$2"
    case $1 in
        dense) measure "$result" --pretrained ;;
        sparsegpt_updated)
            prior=$(pruned sparsegpt "$2" --enable-update)
            measure "$result" --sparsity-mode sparse --checkpoint "$prior"
            ;;
        magnitude | wanda | sparsegpt)
            prior=$(pruned "$1" "$2")
            measure "$result" --sparsity-mode sparse --checkpoint "$prior"
            ;;
        *)
            length=${1#maskllm_} prior=${1##*_} length=${length%%_*}
            pruned "$prior" "$2" >/dev/null
            OUTPUT="$output/seed$2" scripts/maskllm.sh $model "$prior" "$length" --seed "$2" \
                >>"$output/seed$2/$1.log" 2>&1
            cp "$output/seed$2/maskllm_$([ "$length" = long ] || echo 1epoch_)$model.${prior}24/MaskLLM-4V/metrics.json" \
                "$result"
            ;;
    esac
    echo "$1, seed $2: done in $SECONDS s"
}

every() { # METHODS: each with its seeds; what draws nothing has one
    for name in $1; do
        for seed in $seeds; do
            echo "$name $seed"
            case $name in dense | magnitude) break ;; esac
        done
    done | xargs -r -P "${JOBS:-2}" -L 1 bash -c "$start" bash
}

# After a failure, xargs begins no other.
start='set -euo pipefail; shopt -s inherit_errexit; trap "[ \$? -eq 0 ] || exit 255" EXIT; method "$@"'
export -f pruned measure method
mkdir -p "$output"
oneshot=$(tr -s ' \n' '\n' <<<"$methods" | grep -v maskllm || true)
learned=$(tr -s ' \n' '\n' <<<"$methods" | grep maskllm || true)
if ! { every "$oneshot" && every "$learned"; }; then
    echo "scripts/nm_table.sh: stopped, see the logs in $output; the same command goes on from here" >&2
    exit 1
fi
"$PYTHON" compare.py --nm "$output/results"
