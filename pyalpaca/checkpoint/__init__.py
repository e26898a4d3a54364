"""The checkpoint room: every layout is a lazy Reader over the same canonical tensors, and a writer from it."""

from pyalpaca.checkpoint.adapter import write_adapter
from pyalpaca.checkpoint.canonical import DTYPES, Reader, cast, memory_reader
from pyalpaca.checkpoint.container.tensor_file import Piece, read_json
from pyalpaca.checkpoint.convert import LAYOUTS, Output, convert, merge, plan_conversion, plan_merge
from pyalpaca.checkpoint.diff import TensorDiff, diff, diff_summary
from pyalpaca.checkpoint.digest import combine, digest, tensor_digests
from pyalpaca.checkpoint.extract import Change, Extraction, extract
from pyalpaca.checkpoint.gguf_token_files import tokenizer_folder
from pyalpaca.checkpoint.hf import write_hf
from pyalpaca.checkpoint.lora import describe_merge
from pyalpaca.checkpoint.megatron_writer import padded_vocab, write_megatron
from pyalpaca.checkpoint.meta import open_meta, write_meta
from pyalpaca.checkpoint.native import (
    find_native,
    native_steps,
    native_tensors,
    read_native_meta,
    write_latest,
    write_native,
)
from pyalpaca.checkpoint.native_files import DamagedError, NativeTensors, write_native_manifest, write_native_shard
from pyalpaca.checkpoint.open import open_checkpoint
from pyalpaca.checkpoint.plan import Plan, describe, execute
from pyalpaca.checkpoint.published import Published, published
from pyalpaca.checkpoint.sizes import SIZES, size_by_name, size_of
from pyalpaca.checkpoint.tokens import copy as copy_tokenizer
from pyalpaca.checkpoint.tokens import count as count_tokens
from pyalpaca.checkpoint.verify import Comparison, Verdict, Verification, compare, verify

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "SIZES",
    "Change",
    "Comparison",
    "DamagedError",
    "Extraction",
    "NativeTensors",
    "Output",
    "Piece",
    "Plan",
    "Published",
    "Reader",
    "TensorDiff",
    "Verdict",
    "Verification",
    "cast",
    "combine",
    "compare",
    "convert",
    "copy_tokenizer",
    "count_tokens",
    "describe",
    "describe_merge",
    "diff",
    "diff_summary",
    "digest",
    "execute",
    "extract",
    "find_native",
    "memory_reader",
    "merge",
    "native_steps",
    "native_tensors",
    "open_checkpoint",
    "open_meta",
    "padded_vocab",
    "plan_conversion",
    "plan_merge",
    "published",
    "read_json",
    "read_native_meta",
    "size_by_name",
    "size_of",
    "tensor_digests",
    "tokenizer_folder",
    "verify",
    "write_adapter",
    "write_hf",
    "write_latest",
    "write_megatron",
    "write_meta",
    "write_native",
    "write_native_manifest",
    "write_native_shard",
]
