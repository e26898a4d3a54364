#!/usr/bin/env bash
# Fine-tune Chinese-LLaMA-Alpaca 7B, 13B or 33B on 8 devices: data-parallel 8, every weight trained.
#   MODEL_PATH=chinese-alpaca-13b DATA_PATH=data/alpaca bash finetune_chinese_llama_alpaca_7_13_33b_tp1_pp1_deepspeed.sh [flags]
# SMOKE=1 runs the same layout on a tiny model on this CPU. The hyper-parameters are in finetune_tp1_pp1.toml.
#
# The recipe shares the optimizer's state among the devices by ZeRO-2, which pyalpaca does not do yet: each device would hold
# 18 bytes for every weight (fp16, fp32 master, two moments, gradient), 121 GB for the 7B. So only SMOKE=1 runs; for real sizes take the tp4_pp2 script beside this one.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ "${SMOKE:-0}" != 1 ]]; then
    echo "error: the $SIZE model does not fit on one device without ZeRO-2, which is not built yet;" \
        "use finetune_chinese_llama_alpaca_7_13_33b_tp4_pp2.sh" >&2
    exit 2
fi
smoke=(--steps 3 --lr-decay-steps 3000 --global-batch-size 32 --dtype fp32)
exec torchrun --standalone --nproc_per_node 8 -m pyalpaca.train --config "$HERE/finetune_tp1_pp1.toml" \
    --model "$MODEL_PATH" --data "$DATA_PATH" --output "$OUTPUT" "${smoke[@]}" "$@"
