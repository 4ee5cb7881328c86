#!/usr/bin/env bash
# Prunes the bundled dit-mini to 2:4 with each one-shot method, puts pictures of what is still drawn in images/dit_*.png
# and prints their Frechet distances from the bundled glyphs:
#   scripts/dit_table.sh [OPTION ...]     options of oneshot_pruning_dit.py, for all runs, such as --N 1 or --seed 1
#   DEBUG=1  a few samples, and no pictures in images/    OUTPUT=output/dit_table    PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${OUTPUT:-output/dit_table}
if [ -n "${DEBUG:-}" ]; then
    set -- --nsamples 16 --num-samples 4 --num-sampling-steps 2 --frechet-samples 4 "$@"
fi
rm -f "$folder/results.csv"
for method in dense random magnitude wanda sparsegpt "sparsegpt --enable-update"; do
    # shellcheck disable=SC2086 # two words
    "${PYTHON:-python}" oneshot_pruning_dit.py --pruner $method --output-dir "$folder" "$@"
done
if [ -z "${DEBUG:-}" ]; then
    mkdir -p images
    for picture in "$folder"/*_samples.png; do
        name=$(basename "$picture" _samples.png)
        cp "$picture" "images/${name/dit-mini/dit}.png"
    done
fi
echo
sed 's/,/ | /g; s/^/| /; s/$/ |/; 1{p; s/[^|]\{1,\}/ --- /g}' "$folder/results.csv"
