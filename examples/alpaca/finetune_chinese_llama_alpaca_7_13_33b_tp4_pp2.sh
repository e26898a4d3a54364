#!/usr/bin/env bash
# Fine-tune Chinese-LLaMA-Alpaca 7B, 13B or 33B on 8 devices: tensor-parallel 4, pipeline-parallel 2.
#   MODEL_PATH=chinese-alpaca-13b DATA_PATH=data/alpaca OUTPUT=runs/a bash finetune_chinese_llama_alpaca_7_13_33b_tp4_pp2.sh [flags]
# SMOKE=1 runs the same layout on a tiny model on this CPU. The hyper-parameters are in finetune_tp4_pp2.toml.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${DATA_PATH:?set DATA_PATH to the --output-prefix that preprocess_data.py was given}"

smoke=()
[[ "${SMOKE:-0}" == 1 ]] && smoke=(--steps 3 --seq-length 128 --global-batch-size 8 --dtype fp32)
exec torchrun --standalone --nproc_per_node 8 -m pyalpaca.train --config "$HERE/finetune_tp4_pp2.toml" \
    --model "$MODEL_PATH" --data "$DATA_PATH" --output "${OUTPUT:-runs/$SIZE-tp4-pp2}" "${smoke[@]}" "$@"
