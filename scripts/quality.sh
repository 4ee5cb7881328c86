#!/usr/bin/env bash
# Prunes the bundled models with each plan of configs/quality/plans.yaml, at each level and under each seed, without
# training, and prints what is left of their quality: at most three hours on two cores, minutes on a GPU, which is used
# where there is one. Tables are in output/quality/table.md, curves beside it, all rows in results.csv. Stopped, it goes
# on when it is started again: what is done is not done twice.
#   scripts/quality.sh [OPTION ...]      options of compare.py for all runs, such as --tf32 or --accelerator cpu
#   STUDIES="vit xvlm_towers"  PLANS="sparsegpt alps"  LEVELS=2:4,50,63,75,90  SEEDS=42,43,44     only these; blip and
#              blip_contrastive are at 75 % alone, dit at 2:4
#   GRID=1     every score with every reconstruction, too: vit-mini at 75 %, one seed
#   SAMPLES=1  calibration with 32 and 128 images instead of 512, too: vit-mini at 75 %
#   ALLOCATIONS=1  the solver of `best` with each allocation, and with block steps, too: vit-mini, xvlm-mini's towers
#   BUDGETS=1      and with budgets of its own for each modality: xvlm-mini, blip-mini; at 75 and 90 %, one seed
#   JOBS=2  runs at a time, on one core each     DEBUG=1  two batches, 75 %, one seed     OUTPUT, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} output=${OUTPUT:-output/quality} DEBUG=${DEBUG:-} more="$*"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
levels=${LEVELS:-2:4,50,63,75,90} seeds=${SEEDS:-42,43,44}
[ -z "$DEBUG" ] || levels=75 seeds=42
export levels seeds towers=configs/xvlm/prune_mini_towers.yaml
. scripts/turns.sh
every="xvlm xvlm_towers vit dit blip blip_contrastive" # the longest first
studies=${STUDIES-$every}
updated="best alps multiflow+lsq magnitude+lsq sparsegpt" # the longest first
scores="omp localmp l2 lamp snip taylor multiflow wanda ria sparsegpt rand"
updates="none sparsegpt lsq admm"

run() { # STUDY PLAN: one model with one plan at all levels under all seeds
    local study=$1 plan=$2 folder="$output/$1/$2" file=configs/quality/plans.yaml own=$levels seeds=$seeds
    local batches options names=() level sparsities="" command
    case $study in
        xvlm) options="-m xvlm --k_test 8" batches=64 ;; # of 8 scenes: 512
        xvlm_towers) options="-m xvlm --config $towers" batches=64 ;;
        blip) options="-m blip --k_test 8" batches=64 own=75 ;;
        blip_contrastive) options="-m blip" batches=64 own=75 ;;
        dit) options="-m dit" batches=32 own=2:4 ;; # of 16 samples: 512
        vit) options="-m dino" batches=32 ;;
        grid) options="-m dino" batches=32 own=75 seeds=${seeds%%,*} file=$output/grid.yaml ;;
        samples_32) options="-m dino" batches=2 own=75 ;;
        samples_128) options="-m dino" batches=8 own=75 ;;
        vit_allocations) options="-m dino" batches=32 own=63,75,90 file=configs/quality/allocations.yaml ;;
        xvlm_allocations) options="-m xvlm --config $towers" batches=64 own=63,75,90 file=configs/quality/allocations.yaml ;;
        xvlm_budgets) options="-m xvlm --config $towers" batches=64 own= seeds=${seeds%%,*} ;;
        blip_budgets) options="-m blip" batches=64 own= seeds=${seeds%%,*} ;;
    esac
    case $study in *_budgets) file=configs/quality/budgets.yaml own=$([ "${plan#vision}" -gt 85 ] && echo 90 || echo 75) ;; esac
    [ -z "$DEBUG" ] || batches=2
    [ -z "$DEBUG" ] || [[ $study == *_budgets ]] || own=75
    for level in ${own//,/ }; do
        case $level in
            *:*) names+=("$plan $level") ;;
            *) sparsities+=${sparsities:+,}$level ;;
        esac
    done
    [ -z "$sparsities" ] || names=("$plan" "${names[@]}")
    [ "$study" != grid ] || names=("${updates[@]/#/$plan }")
    command=(compare.py --plans "$file" -p "$(IFS=, && echo "${names[*]}")" --seeds "$seeds" --num_batches "$batches"
        --output_dir "$folder")
    [ "$plan" != "$(plain "$study")" ] || command+=(--int8) # once for all plans
    [ -z "$sparsities" ] || command+=(-s "$sparsities")
    # shellcheck disable=SC2206 # several words
    command+=($options $more)
    inputs=$(cksum <"$file") once "$folder" "${command[@]}"
}

wanted() { # what is to be run: STUDY PLAN, a line each
    local study plan
    for study in $studies; do
        for plan in $updated $(plain "$study"); do
            [[ " ${PLANS:-$plan} " != *" $plan "* ]] || echo "$study $plan"
        done
    done
    [ -z "${SAMPLES:-}" ] || for study in samples_32 samples_128; do
        for plan in $updated; do
            [[ " ${PLANS:-$plan} " != *" $plan "* ]] || echo "$study $plan"
        done
    done
    [ -z "${ALLOCATIONS:-}" ] || for plan in uniform owl alpha ecoflap error error_output block_steps; do
        echo "vit_allocations $plan"
        echo "xvlm_allocations $plan"
    done
    [ -z "${BUDGETS:-}" ] || for plan in 65 70 75 80 85 86 88 90 92 94; do
        echo "xvlm_budgets vision$plan"
        echo "blip_budgets vision$plan"
    done
    [ -z "${GRID:-}" ] || for plan in $scores; do
        echo "grid $plan"
    done
}

plain() { # STUDY: the best mask without an update
    [ "$1" = vit ] && echo wanda || echo magnitude
}

for study in $studies; do
    # shellcheck disable=SC2086 # several words
    known "$study" $every
done
mkdir -p "$output"
for score in $scores; do
    for update in $updates; do
        echo "$score $update: {pruner: $score, reconstruct: $update}"
    done
done >"$output/grid.yaml"
export updates
export -f run plain
wanted | turns 'read -ra updates <<<"$updates"; run'
"$PYTHON" compare.py --quality "$output"
