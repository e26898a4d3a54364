#!/usr/bin/env bash
# Fine-tune a Chinese-LLaMA on instructions as the original Chinese-Alpaca was: LoRA of rank 8, embedding and head in full.
#   MODEL_PATH=chinese-llama-7b DATA_PATH=data/alpaca OUTPUT=runs/a [DEVICES=8] bash sft_chinese_alpaca_lora.sh [flags]
# SMOKE=1 runs it on a tiny model on this CPU. The hyper-parameters are in sft_lora.toml; --pack puts short samples together.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${DATA_PATH:?set DATA_PATH to the --output-prefix that preprocess_data.py was given}"
DEVICES="${DEVICES:-1}"

smoke=()
[[ "${SMOKE:-0}" == 1 ]] && smoke=(--steps 3 --split 9,1,0 --eval-every 2 --eval-samples 8 --log-every 1 --dtype fp32)
exec torchrun --standalone --nproc_per_node "$DEVICES" -m pyalpaca.train --config "$HERE/sft_lora.toml" \
    --global-batch-size "$((8 * DEVICES))" \
    --model "$MODEL_PATH" --data "$DATA_PATH" --output "${OUTPUT:-runs/$SIZE-sft}" "${smoke[@]}" "$@"
