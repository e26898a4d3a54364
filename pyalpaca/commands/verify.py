"""`pyalpaca verify`: files against the published sha256, and weights against a reference."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyalpaca.commands.writing import adapter_list

if TYPE_CHECKING:
    from pyalpaca.checkpoint import TensorDiff, Verdict, Verification

_NAMED = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Compare the sha256 of weight and tokenizer files with those published for LLaMA, Chinese-LLaMA and "
        "Chinese-Alpaca. OK: the hash is in the table, or would be if another version of torch had saved the same tensors: a "
        "hash covers the container that torch wrote around the weights as well, and for a .pth or .bin that does not match, the "
        "hashes that it would have in the others are computed. MISMATCH: the weights are not those expected, or the file is "
        "damaged. UNKNOWN: the table has no such weights. With --reference the weights are compared, tensor by tensor, with a "
        "checkpoint known to be right, or with a merge that is made for it. Status 0 if every weight file is OK or the weights "
        "are those of the reference, 1 if one is not or a shard is missing, 2 for bad input.",
        epilog="example: pyalpaca verify alpaca-plus-7b-pth --model Chinese-Alpaca-Plus-7B --reference llama-7b-hf "
        "--reference-lora chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b",
    )
    parser.add_argument("path", metavar="PATH", help="a file, or a folder of weight and tokenizer files")
    parser.add_argument("--model", metavar="NAME", help="which model it should be, as in the published table (any case)")
    parser.add_argument("--reference", metavar="REF", help="checkpoint folder of any layout: say which tensors differ from its")
    parser.add_argument(
        "--reference-lora", type=adapter_list, default=[], metavar="A[,B]", help="adapter folders, merged into REF in this order"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)
    if args.reference_lora and not args.reference:
        raise ValueError("--reference-lora: no --reference was given to merge the adapters into; name the base model with it")

    from pyalpaca.checkpoint import open_checkpoint, verify

    reference = open_checkpoint(args.reference, lora=args.reference_lora) if args.reference else None
    report = verify(args.path, args.model, reference)
    name = " + ".join([str(args.reference), *args.reference_lora])
    if args.json:
        print(json.dumps(_fields(report, name), ensure_ascii=False))
    else:
        print("\n".join(_lines(report, name)))
    return 0 if report.ok else 1


def _fields(report: Verification, reference: str) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "files": [_file_fields(v) for v in report.verdicts],
        "problems": list(report.problems),
        "reference": _comparison_fields(report, reference),
    }


def _file_fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "file": str(verdict.path),
        "status": verdict.status,
        "sha256": verdict.sha256,
        "reason": verdict.reason,
        "found": asdict(verdict.found) if verdict.found else None,
        "expected": asdict(verdict.expected) if verdict.expected else None,
        "container": asdict(verdict.container) if verdict.container else None,
    }


def _comparison_fields(report: Verification, reference: str) -> dict[str, Any] | None:
    comparison = report.comparison
    if comparison is None:
        return None
    return {
        "reference": reference,
        "tensors": comparison.tensors,
        "differing": [
            {"tensor": d.name, "reason": d.reason, "max_difference": d.max if d.compared and math.isfinite(d.max) else None}
            for d in comparison.differing
        ],
        "digest": comparison.digest,
        "reference_digest": comparison.reference_digest,
    }


def _lines(report: Verification, reference: str) -> list[str]:
    lines = []
    for verdict in report.verdicts:
        lines.append(f"{verdict.status:<9} {verdict.path.name}: {verdict.reason}")
        if verdict.status != "OK":
            lines.append(f"{'':<9} sha256 {verdict.sha256}")
    lines += [f"MISMATCH  {problem}" for problem in report.problems]
    lines += _comparison_lines(report, reference)
    if report.comparison is None and any(v.container and v.status != "OK" for v in report.verdicts):
        lines += [
            "",
            "Which tensors differ is said by --reference BASE --reference-lora A,B: the merge, made anew to compare with.",
        ]
    return lines


def _comparison_lines(report: Verification, reference: str) -> list[str]:
    comparison = report.comparison
    if comparison is None:
        return []
    if not comparison.differing:
        return [
            f"OK        the weights, {comparison.tensors} tensors, are byte for byte those of {reference}",
            f"{'':<9} digest {comparison.digest}",
        ]
    count, more = len(comparison.differing), len(comparison.differing) - _NAMED
    lines = [f"MISMATCH  {count} of {comparison.tensors} tensors differ, A is what is verified, B is {reference}"]
    lines += [f"{'':<9} {_difference(d)}" for d in comparison.differing[:_NAMED]]
    return [*lines, f"{'':<9} and {more} more"] if more > 0 else lines


def _difference(entry: TensorDiff) -> str:
    return f"{entry.name}: {entry.reason}" + (f", max abs difference {entry.max:.3e}" if entry.compared else "")
