#!/usr/bin/env bash
# Learns 2:4 masks of vit_mini from those of magnitude: four short epochs. See scripts/maskllm.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/maskllm.sh" vit_mini magnitude short "$@"
