"""`pyalpaca verify`: files against the published sha256."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyalpaca.checkpoint import Verdict, Verification


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(
        description="Compare the sha256 of weight and tokenizer files with those published for LLaMA, Chinese-LLaMA and "
        "Chinese-Alpaca. OK: the hash is in the table. MISMATCH: another one was expected, or the file is damaged. UNKNOWN: the "
        "table can't say. A hash covers the container that torch wrote as well as the weights, so for a .pth that does not "
        "match the container is described and the digest of the content is printed. Status 0 if every weight file is OK, "
        "1 if one is not or a shard is missing, 2 for bad input.",
        epilog="example: pyalpaca verify alpaca-plus-7b-pth --model Chinese-Alpaca-Plus-7B",
    )
    parser.add_argument("path", metavar="PATH", help="a file, or a folder of weight and tokenizer files")
    parser.add_argument("--model", metavar="NAME", help="which model it should be, as in the published table (any case)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)

    from pyalpaca.checkpoint import verify

    report = verify(args.path, args.model)
    if args.json:
        print(json.dumps(_fields(report), ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))
    return 0 if report.ok else 1


def _fields(report: Verification) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "files": [_file_fields(v) for v in report.verdicts],
        "problems": list(report.problems),
        "digest": report.digest,
        "digest_error": report.digest_error,
    }


def _file_fields(verdict: Verdict) -> dict[str, Any]:
    box = verdict.container
    return {
        "file": str(verdict.path),
        "status": verdict.status,
        "sha256": verdict.sha256,
        "reason": verdict.reason,
        "found": asdict(verdict.found) if verdict.found else None,
        "expected": asdict(verdict.expected) if verdict.expected else None,
        "container": {**asdict(box), "writer": box.writer} if box else None,
    }


def _lines(report: Verification) -> list[str]:
    lines = []
    for verdict in report.verdicts:
        lines.append(f"{verdict.status:<9} {verdict.path.name}: {verdict.reason}")
        if verdict.status != "OK":
            lines.append(f"{'':<9} sha256 {verdict.sha256}")
        if verdict.container:
            lines.append(f"{'':<9} {verdict.container}")
    lines += [f"MISMATCH  {problem}" for problem in report.problems]
    if any(v.container and v.status != "OK" for v in report.verdicts):
        lines += [
            "",
            "A download of the published file would match. For a file that was merged, converted or saved again, the hash can't",
            "decide: it covers the zip container too, whose layout changes with the torch version and the order of the tensors.",
        ]
    if report.digest:
        lines += [
            "The digest of the content does: compare it with that of weights known to be right (`pyalpaca digest FOLDER`), or of",
            "the merge made anew (`pyalpaca digest BASE --lora A,B`).",
            f"digest {report.digest}",
        ]
    elif report.digest_error:
        lines.append(f"No content digest: {report.digest_error}")
    return lines
