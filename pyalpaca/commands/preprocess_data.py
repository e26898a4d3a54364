"""preprocess_data: a file of records to the prepared data set that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path

_HANDLERS = (
    "GeneralPretrainHandler",
    "GeneralInstructionHandler",
    "BelleMultiTurnInstructionHandler",
    "MOSSInstructionHandler",
    "ShareGPTInstructionHandler",
)
_EXAMPLE = """example:
  python tools/preprocess_data.py --input alpaca_data.json --output-prefix data/alpaca --tokenizer-name-or-path llama-7b-hf \\
      --handler-name GeneralInstructionHandler --append-eod --workers 4
  writes data/alpaca_packed_{input_ids,attention_mask,labels}_document.{bin,idx}; training takes the prefix data/alpaca
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn a file of records into the indexed data set that training reads: token ids, labels and masks, int32.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="file or folder of .json, .jsonl, .csv, .parquet (needs pyarrow) or .txt")
    add("--output-prefix", required=True, help="where the data set goes: the beginning of its file names")
    add(
        "--handler-name",
        choices=_HANDLERS,
        default=_HANDLERS[0],
        help="what a record is: text, {instruction, input, output}, BELLE's or MOSS's or ShareGPT's turns (default: %(default)s)",
    )
    add("--json-keys", nargs="+", default=["text"], help="the keys that hold text, for GeneralPretrainHandler (default: text)")
    add(
        "--prompt-template",
        choices=("ascendspeed", "alpaca", "alpaca-cli", "none"),
        default="ascendspeed",
        help="the words around an instruction; alpaca is what Chinese-Alpaca was trained with: it ends every answer with the "
        "end token and cuts at 512 ids (default: %(default)s)",
    )
    add("--tokenizer-name-or-path", type=Path, required=True, help="folder with tokenizer.model, or the file itself")
    add(
        "--tokenizer-type",
        choices=("PretrainedFromHF",),
        default="PretrainedFromHF",
        help="accepted for compatibility: the only type there is",
    )
    add(
        "--tokenizer-not-use-fast",
        action="store_true",
        help="accepted for compatibility: it makes no difference, SentencePiece itself is used",
    )
    add(
        "--append-eod", action="store_true", help="end every sequence with the end token; without it a model never learns to stop"
    )
    add(
        "--seq-length",
        type=int,
        help="cut sequences at the right to this many ids (default: no cut, 512 with the alpaca templates)",
    )
    add("--workers", type=int, default=1, help="number of processes; the result does not depend on it (default: %(default)s)")
    add("--log-interval", type=int, default=100, help="records between two steps of the progress bar (default: %(default)s)")
    add("--dataset-impl", choices=("mmap",), default="mmap", help="accepted for compatibility: mmap is the only format written")
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="round the printed vocabulary size up to a multiple of this; the files do not depend on it (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. ValueError or OSError for what a user did."""
    args = _parser().parse_args(argv)
    from pyalpaca.data import Job, preprocess

    multiple = args.make_vocab_size_divisible_by
    if multiple < 1:
        raise ValueError(f"--make-vocab-size-divisible-by is {multiple}, expected at least 1")
    summary = preprocess(
        Job(
            input=args.input,
            output_prefix=args.output_prefix,
            tokenizer=args.tokenizer_name_or_path,
            handler=args.handler_name,
            prompt_template=args.prompt_template,
            json_keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            seq_length=args.seq_length,
            workers=args.workers,
            log_interval=args.log_interval,
        )
    )
    padded = -(-summary.vocab_size // multiple) * multiple
    for prefix in summary.prefixes:
        print(f"{prefix}.bin and .idx")
    s = summary
    print(
        f"{s.records:,} records, {s.sequences:,} sequences, {s.tokens:,} tokens of which {s.learnt:,} are learnt, "
        f"the longest sequence {s.longest:,}, {s.cut:,} cut; vocabulary {s.vocab_size:,}, padded {padded:,}"
    )
    if summary.unended:
        print(
            f"{summary.unended:,} sequences have no end token: a model trained on them never learns to stop; --append-eod adds it"
        )
    return 0
