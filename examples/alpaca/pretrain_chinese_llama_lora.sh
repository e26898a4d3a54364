#!/usr/bin/env bash
# Pre-train a LLaMA with a Chinese vocabulary on text as the original Chinese-LLaMA was: LoRA of rank 8, embedding and head in full.
#   MODEL_PATH=llama-7b-zh DATA_PATH=data/text OUTPUT=runs/a [DEVICES=8] bash pretrain_chinese_llama_lora.sh [flags]
# DATA_PATH is the --output-prefix of preprocess_data.py --handler-name GeneralPretrainHandler.
# SMOKE=1 runs it on a tiny model on this CPU. The hyper-parameters are in pretrain_lora.toml.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
DEVICES="${DEVICES:-1}"

smoke=()
if [[ "${SMOKE:-0}" == 1 ]]; then
    smoke=(--steps 3 --seq-length 128 --log-every 1 --dtype fp32)
    DATA_PATH="$SMOKE_DIR/text"
    if [[ ! -f "$DATA_PATH"_text_document.idx ]]; then
        python - "$SMOKE_DIR/text.jsonl" <<'END'
import json, sys
from pyalpaca.demo.make_model import RECORDS

with open(sys.argv[1], "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"text": r["output"]}) + "\n" for r in json.loads(RECORDS.read_text(encoding="utf-8")))
END
        python "$TOOLS/preprocess_data.py" --input "$SMOKE_DIR/text.jsonl" --output-prefix "$DATA_PATH" --append-eod \
            --tokenizer-name-or-path "$MODEL_PATH" --handler-name GeneralPretrainHandler
    fi
fi
: "${DATA_PATH:?set DATA_PATH to the --output-prefix that preprocess_data.py was given}"
exec torchrun --standalone --nproc_per_node "$DEVICES" -m pyalpaca.train --config "$HERE/pretrain_lora.toml" \
    --global-batch-size "$((8 * DEVICES))" \
    --model "$MODEL_PATH" --data "$DATA_PATH" --output "${OUTPUT:-runs/$SIZE-pretrain}" "${smoke[@]}" "$@"
