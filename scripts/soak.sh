#!/usr/bin/env bash
# Kills pruning, fine-tuning and mask training with kill -9 at random moments of their work, each up to four times before
# it may come to its end, again and again on two-layer models, and compares what is in the folder then with that of a run
# without a kill: the same files, weights, masks and metrics the same bit for bit. Ends with 1 where anything was lost, or
# one of them was killed less often than KILLS.
#   MINUTES=30  how long, after a run of each      KILLS=20      SEED=1  of the moments      OUTPUT=output/soak      PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} output=${OUTPUT:-output/soak} least=${KILLS:-20}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
tasks=(pruning "pruning, chita" fine-tuning "mask training")
configs=tests/data/configs

command_of() { # TASK FOLDER
    case $1 in
        pruning)
            command=(prune.py -m xvlm -p sparsegpt --enable_update -s 50 --num_batches 20)
            command+=(--config "$configs/prune.yaml" --output_dir "$2")
            ;;
        "pruning, chita") # its gradients in a file
            command=(prune.py -m xvlm -p chita -e 4 -s 50 --num_batches 4 --memory_budget 1KB)
            command+=(--config "$configs/prune.yaml" --output_dir "$2")
            ;;
        fine-tuning)
            command=(retrieval.py --model xvlm --dense --config "$output/retrieval.yaml" --output_dir "$2"
                --precision 32-true)
            ;;
        *)
            command=(maskllm_train.py --model xvlm --config "$configs/prune.yaml" --preset llm --mask-only --evaluate
                --num_batches 10 --epochs 3 --save-every 4 --batch-size 2 --output "$2" --experiment run)
            ;;
    esac
    command+=(--accelerator cpu)
}

digest() { # FOLDER: the names of all files, and the contents of those that tell neither times nor paths
    (cd "$1" && find . -type f | sort && find . -name '*.safetensors' -o -name metrics.json | sort | xargs sha256sum) |
        sha256sum
}

at_work() { # PROCESS FOLDER: waits until the process holds its folder: imports are over. 1 where it ends before
    until grep -qrs --include=running.lock "\"pid\": $1," "$2"; do
        kill -0 "$1" 2>/dev/null || return 1
        sleep 0.05
    done
}

now() { echo $((${EPOCHREALTIME/./} / 1000)); } # ms

whole() { # TASK: a run without a kill; prints how long it works, in ms, and the digest of its folder
    local begin folder="$output/whole $1"
    command_of "$1" "$folder"
    "$python" "${command[@]}" >"$folder.log" 2>&1 &
    at_work $! "$folder" || true
    begin=$(now)
    if ! wait $!; then
        cat "$folder.log" >&2
        return 1
    fi
    echo "$(($(now) - begin))"
    digest "$folder"
}

soak() { # TASK NUMBER: kills its runs until the time is over; prints kills, runs that ended with the same bits, lost ones
    local task=$1 kills=0 ends=0 lost=0 left=0 length expected run killed code pause
    local folder="$output/cut $1"
    { read -r length && read -r expected; } <"$output/whole $1.txt"
    RANDOM=$((${SEED:-1} + $2))
    command_of "$task" "$folder"
    while ((SECONDS < deadline)) || [ -e "$folder" ]; do
        [ -e "$folder" ] || left=$((1 + RANDOM % 4)) # kills of this run
        "$python" "${command[@]}" >"$folder.log" 2>&1 &
        run=$! killed=none
        pause=$(((RANDOM * 32768 + RANDOM) % length)) # ms
        if ((left > 0 && SECONDS < deadline)) && at_work "$run" "$folder"; then
            left=$((left - 1))
            sleep "$((pause / 1000)).$(printf %03d $((pause % 1000)))"
            kill -9 "$run" 2>/dev/null && killed=137 || true
        fi
        code=0
        wait "$run" 2>/dev/null || code=$?
        if [ "$code" = "$killed" ]; then
            kills=$((kills + 1))
        elif ((code == 0)) && [ "$(digest "$folder")" = "$expected" ]; then
            ends=$((ends + 1))
            rm -rf "$folder"
        else
            lost=$((lost + 1))
            echo "$task: exit code $code, or other results than without kills: kept in $folder.$lost" >&2
            tr '\r' '\n' <"$folder.log" | tail -n 5 >&2
            mv "$folder" "$folder.$lost"
        fi
    done
    echo "$kills $ends $lost"
}

rm -rf "$output"
mkdir -p "$output"
{
    sed 's/epochs: 3/epochs: 8/' "$configs/retrieval.yaml"
    echo "save_every: 3"
} >"$output/retrieval.yaml"

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
each() { # FUNCTION: for all tasks at the same time; what it prints is in files
    pids=()
    for number in "${!tasks[@]}"; do
        "$1" "${tasks[number]}" "$number" >"$output/$1 ${tasks[number]}.txt" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || exit 1
    done
}

each whole
deadline=$((SECONDS + 60 * ${MINUTES:-30}))
each soak

printf '\n| %-14s | kills | runs that ended, with the same bits | lost |\n' ""
echo "| -------------- | ----: | ----------------------------------: | ---: |"
failed=0
for task in "${tasks[@]}"; do
    read -r kills ends lost <"$output/soak $task.txt"
    printf '| %-14s | %5d | %35d | %4d |\n' "$task" "$kills" "$ends" "$lost"
    ((lost == 0 && kills >= least)) || failed=1
done
exit "$failed"
