#!/usr/bin/env bash
# Learns 2:4 masks of vit_base_patch16_224.augreg_in1k from ALPS' masks and weights: 20 epochs with a moving average. See scripts/maskllm.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/maskllm.sh" vit_base_patch16_224.augreg_in1k alps long "$@"
