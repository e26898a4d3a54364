#!/usr/bin/env bash
# Fine-tune Chinese-LLaMA-Alpaca 7B, 13B or 33B on 8 devices under DeepSpeed: data-parallel 8 with ZeRO-2, every weight trained.
#   MODEL_PATH=chinese-alpaca-7b DATA_PATH=data/alpaca OUTPUT=runs/a bash finetune_chinese_llama_alpaca_7_13_33b_tp1_pp1_deepspeed.sh [flags]
# SMOKE=1 runs the same layout on a tiny model on this CPU, in fp32. The hyper-parameters are in finetune_tp1_pp1.toml, ZeRO's in
# ds_config_tp1_pp1.json. DeepSpeed is not among pyalpaca's own dependencies: pip install deepspeed.
#
# ZeRO-2 shares gradients and the optimizer's state (14 bytes for each weight) among the 8 devices; each still holds all weights in
# fp16 (2 bytes): 65 GB of a 33B, for which the tp4_pp2 script is the better one on devices of 64 GB.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${DATA_PATH:?set DATA_PATH to the --output-prefix that preprocess_data.py was given}"

smoke=()
[[ "${SMOKE:-0}" == 1 ]] && smoke=(--steps 3 --lr-decay-steps 3000 --global-batch-size 32 --dtype fp32)
exec torchrun --standalone --nproc_per_node 8 -m pyalpaca.train --config "$HERE/finetune_tp1_pp1.toml" \
    --engine deepspeed --deepspeed-config "$HERE/ds_config_tp1_pp1.json" \
    --model "$MODEL_PATH" --data "$DATA_PATH" --output "${OUTPUT:-runs/$SIZE-tp1-pp1}" "${smoke[@]}" "$@"
