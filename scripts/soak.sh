#!/usr/bin/env bash
# Kills pruning, fine-tuning and mask training with kill -9 at random moments, each again and again until it comes to its
# end, on two-layer models, and compares what it has written with that of a run without a kill, bit for bit.
#   MINUTES=30  how long      SEED=1  of the moments      OUTPUT=output/soak      PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} output=${OUTPUT:-output/soak}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
RANDOM=${SEED:-1}
deadline=$((SECONDS + 60 * ${MINUTES:-30}))
tasks=(pruning fine-tuning "mask training")
configs=tests/data/configs
declare -A kills ends lost whole length

command_of() { # TASK FOLDER
    case $1 in
        pruning)
            command=(prune.py -m xvlm -p sparsegpt --enable_update -s 50 --num_batches 150 --config "$configs/prune.yaml")
            command+=(--output_dir "$2")
            ;;
        fine-tuning)
            command=(retrieval.py --model xvlm --dense --config "$output/retrieval.yaml" --output_dir "$2"
                --precision 32-true)
            ;;
        *)
            command=(maskllm_train.py --model xvlm --config "$configs/prune.yaml" --preset llm --mask-only --evaluate
                --num_batches 60 --epochs 4 --save-every 5 --batch-size 2 --output "$2" --experiment run)
            ;;
    esac
    command+=(--accelerator cpu)
}

digest() { # FOLDER: of all weights and masks, and that nothing half done is left
    (cd "$1" && find . -name '*.safetensors' -o -name '*.tmp-*' -o -name running.lock | sort | xargs sha256sum | sha256sum)
}

rm -rf "$output"
mkdir -p "$output"
{
    sed 's/epochs: 3/epochs: 30/' "$configs/retrieval.yaml"
    echo "save_every: 3"
} >"$output/retrieval.yaml"
for task in "${tasks[@]}"; do
    begin=${EPOCHREALTIME/./}
    command_of "$task" "$output/whole $task"
    if ! "$python" "${command[@]}" >"$output/log" 2>&1; then
        cat "$output/log" >&2
        exit 1
    fi
    length[$task]=$(((${EPOCHREALTIME/./} - begin) / 1000)) # ms
    whole[$task]=$(digest "$output/whole $task")
    kills[$task]=0 ends[$task]=0 lost[$task]=0
    echo "$task: a run takes ${length[$task]} ms"
done

while ((SECONDS < deadline)); do
    for task in "${tasks[@]}"; do
        folder="$output/cut $task"
        command_of "$task" "$folder"
        "$python" "${command[@]}" >"$output/log" 2>&1 &
        run=$!
        wait_ms=$((length[$task] / 3 + (RANDOM * 32768 + RANDOM) % length[$task])) # the first third is imports
        for ((waited = 0; waited < wait_ms; waited += 50)); do
            kill -0 "$run" 2>/dev/null || break
            sleep 0.05
        done
        kill -9 "$run" 2>/dev/null || true
        code=0
        wait "$run" 2>/dev/null || code=$?
        if ((code == 137)); then
            kills[$task]=$((kills[$task] + 1))
        elif ((code == 0)) && [ "$(digest "$folder")" = "${whole[$task]}" ]; then
            ends[$task]=$((ends[$task] + 1))
            rm -rf "$folder"
        else
            lost[$task]=$((lost[$task] + 1))
            echo "$task: exit code $code, or other results than without kills: kept in $folder.${lost[$task]}" >&2
            tr '\r' '\n' <"$output/log" | tail -n 5 >&2
            mv "$folder" "$folder.${lost[$task]}"
        fi
    done
done

printf '\n| %-13s | kills | runs that ended, with the same bits | lost |\n' ""
echo "| ------------- | ----: | ----------------------------------: | ---: |"
failed=0
for task in "${tasks[@]}"; do
    printf '| %-13s | %5d | %35d | %4d |\n' "$task" "${kills[$task]}" "${ends[$task]}" "${lost[$task]}"
    failed=$((failed + lost[$task]))
done
exit $((failed > 0))
