#!/usr/bin/env bash
# Generate with Chinese-Alpaca on 8 devices, tensor-parallel 8; prompts from the terminal, or by --prompt.
#   MODEL_PATH=chinese-alpaca-13b bash generate_alpaca_13B_tp8_pp1.sh --prompt "你好"
# SMOKE=1 runs the same layout on a tiny model on this CPU. 33B has 52 heads, which 8 does not divide: give it 4 devices.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DEVICES=8
[[ "$SIZE" == 33B ]] && DEVICES=4
smoke=()
[[ "${SMOKE:-0}" == 1 && $# == 0 ]] && smoke=(--prompt "中国的首都是哪里？" --max-new-tokens 16)
exec torchrun --standalone --nproc_per_node "$DEVICES" -m pyalpaca.generate --model "$MODEL_PATH" --tp "$DEVICES" --template alpaca \
    --temperature 0.7 --top-k 50 --top-p 0.95 --max-new-tokens 128 "${smoke[@]}" "$@"
