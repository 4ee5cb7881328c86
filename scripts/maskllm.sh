#!/usr/bin/env bash
# Learns 2:4 masks of a vision transformer from the masks of a one-shot pruner, which it makes where they are not there.
#   scripts/maskllm.sh MODEL PRUNER long|short [further options of maskllm_train.py]
# Of a pruner that updates the kept weights (alps, admm, best) the weights are begun with, too.
# long: 20 epochs with a moving average; short: one epoch without. ImageNet is read from data/imagenet/{train,val}, on 4
# GPUs of 24 GB with batches of 128 each. The bundled vit_mini needs no download: 18 and 4 short epochs, about 23 and 5
# minutes on a core. Stopped, it goes on when it is started again.
#   DATA_PATH=data/imagenet  DEVICES=4  BATCH=128  WORKERS=8  OUTPUT=output  DEBUG=1 (a few steps)  PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${MODEL:-$1} pruner=$2 length=$3
shift 3
python=${PYTHON:-python} output=${OUTPUT:-output}
bundled=${DATA_PATH:-$([ "$model" = vit_mini ] && echo bundled || echo data/imagenet)}
prior=$output/pruned/$model.${pruner}24.pt
folder=$output/maskllm_$([ "$length" = long ] || echo 1epoch_)$model.${pruner}24

recipe=(--mask-only --opt adamw --weight-decay 0.01 --sched cosine --clip-grad 2.0 --smoothing 0.1
    --sparse-weight-reg 1e-5 --prior-strength 3)
case $bundled in
    bundled) # few steps: what is annealed follows them, and the rate is higher
        recipe+=(--lr 5e-3 --min-lr 5e-4 --schedule-unit step --batch-size "${BATCH:-64}" --workers "${WORKERS:-0}")
        recipe+=(--val-images 556 --devices "${DEVICES:-1}" --epochs "$([ "$length" = long ] && echo 18 || echo 4)")
        ;;
    *)
        recipe+=(--lr 1e-3 --min-lr 1e-4 --batch-size "${BATCH:-128}" --workers "${WORKERS:-8}" --amp)
        recipe+=(--devices "${DEVICES:-4}" --epochs "$([ "$length" = long ] && echo 20 || echo 1)")
        recipe+=(--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --crop-pct 0.9 --mixup 0.8 --cutmix 1.0 --drop-path 0.1)
        recipe+=(--aa rand-m8-inc1-mstd101 --reprob 0.3)
        ;;
esac
case $length in
    long) recipe+=(--tau-range 4 0.05 --scaling-range 10 100 --model-ema --model-ema-decay "${EMA:-0.9998}") ;;
    short) recipe+=(--tau-range 1 1 --scaling-range 100 100) ;;
    *)
        echo "maskllm.sh: expected long or short, got $length" >&2
        exit 2
        ;;
esac
case $pruner in alps | admm | best) recipe+=(--prior-weights "$prior") ;; esac
samples=128
if [ -n "${DEBUG:-}" ]; then
    samples=4
    recipe+=(--steps 2 --devices 1 --batch-size 4 --workers 0 --val-images 8 --test-images 8 --train-images 8)
fi

if [ ! -f "$prior" ]; then
    "$python" oneshot_pruning_timm.py --model "$model" --pruner "$pruner" --data-path "$bundled" --nsamples "$samples" \
        --save-model "$prior" --skip-eval
fi
"$python" maskllm_train.py --model "$model" --pretrained --sparsity-mode maskllm --sparse-checkpoint "$prior" \
    --data-path "$bundled" --output "$folder" --experiment MaskLLM-4V "${recipe[@]}" "$@"
