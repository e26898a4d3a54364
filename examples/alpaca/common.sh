# Sourced by the scripts beside it: where things are, the model's size, and with SMOKE=1 a tiny model for a try on a CPU.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
TOOLS="$HERE/../../tools"

if [[ "${SMOKE:-0}" == 1 ]]; then
    # More processes than cores: one thread each.
    export OMP_NUM_THREADS=1
    SMOKE_DIR="${SMOKE_DIR:-runs/smoke}"
    MODEL_PATH="$SMOKE_DIR/tiny-13B"
    DATA_PATH="$SMOKE_DIR/alpaca"
    OUTPUT="$SMOKE_DIR/run"
    rm -rf "$OUTPUT" # of an earlier try
    if [[ ! -f "$DATA_PATH"_packed_labels_document.idx ]]; then
        python -m pyalpaca.demo.make_model --output-dir "$SMOKE_DIR/model" --steps 4 --num-heads 8
        python "$TOOLS/merge_llama_with_chinese_lora_low_mem.py" --base_model "$SMOKE_DIR/model/llama/tiny" --output_type huggingface \
            --lora_model "$SMOKE_DIR/model/chinese-llama-plus,$SMOKE_DIR/model/chinese-alpaca-plus" --output_dir "$MODEL_PATH"
        records="$(python -c 'from pyalpaca.demo.make_model import RECORDS; print(RECORDS)')"
        python "$TOOLS/preprocess_data.py" --input "$records" --output-prefix "$DATA_PATH" --append-eod \
            --tokenizer-name-or-path "$MODEL_PATH" --handler-name GeneralInstructionHandler
    fi
fi

: "${MODEL_PATH:?set MODEL_PATH to the model: a folder in any layout, merged with its adapters; or SMOKE=1 for a tiny one on this CPU}"
case "$MODEL_PATH" in
    *13[Bb]*) SIZE=13B ;;
    *33[Bb]*) SIZE=33B ;;
    *) SIZE=7B ;;
esac
