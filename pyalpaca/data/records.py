"""Reading records: Alpaca JSON, JSON lines, CSV, parquet and plain text, each found out and checked before it is believed."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pyalpaca.data.downloads import refuse_downloads

Record: TypeAlias = dict[str, Any]

_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def read_records(path: str | Path) -> tuple[Iterator[Record], int | None]:
    """The records of a file, or of all such files of a folder in the order of their names, and their number where it is known.

    .json is a list of records or one record a line; .jsonl one a line; .csv names its columns in the first line; .parquet
    needs pyarrow; .txt gives {"text": line} for each line. FileNotFoundError; ValueError for anything else than records,
    raised at the latest when the iterator arrives at it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{path}: holds no file ending with one of {', '.join(_SUFFIXES)}; check the folder")
        opened = [read_records(file) for file in files]
        totals = [total for _, total in opened if total is not None]
        return (r for records, _ in opened for r in records), sum(totals) if len(totals) == len(opened) else None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a data set; check --input")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    with path.open("rb") as stream:
        start = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    refuse_downloads(path, start, "records in JSON, JSON lines, CSV or text")
    if not start:
        raise ValueError(f"{path}: is empty, expected records; check the download")
    if suffix == ".csv":
        return _csv(path), None
    if suffix == ".txt":
        return ({"text": line} for _, line in _lines(path)), None
    if start.startswith(b"{") and (suffix == ".jsonl" or _one_record_a_line(path)):
        return _json_lines(path), None
    return _json_list(path)


@contextmanager
def _text_errors(path: Path) -> Iterator[None]:
    """Turn a decoding error into the sentence a user can act on."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start:,} is no UTF-8, expected UTF-8 text; convert it, for example with iconv"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _text_errors(path), path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _one_record_a_line(path: Path) -> bool:
    first = next(line for _, line in _lines(path))
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is not JSON ({error}); expected one record a line, repair that line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is {_kind(record)}, expected a record {{...}}; repair that line")
        yield record


def _json_list(path: Path) -> tuple[Iterator[Record], int]:
    with _text_errors(path):
        text = path.read_text(encoding="utf-8-sig")
    try:
        records = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); the file may be cut off, download it again or repair it") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds {_kind(records)}, expected a list of records [{{...}}, ...]; wrap the records in a list")
    if not records:
        raise ValueError(f"{path}: holds an empty list, expected records; check the download")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is {_kind(record)}, expected {{...}}; repair that record")
    return iter(records), len(records)


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a long article
    with _text_errors(path), path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(
                        f"{path}: the record that ends at line {reader.line_num} has another number of fields than the "
                        "first line; repair it, perhaps quotes are missing"
                    )
                yield dict(record)
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is not CSV ({error}); repair that line") from error


def _parquet(path: Path) -> tuple[Iterator[Record], int]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped,import-not-found,unused-ignore]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"{path}: reading parquet needs the package `pyarrow`, which is not installed; install it, or convert to JSON lines"
        ) from error
    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a parquet file ({error}); download it again") from error
    return (record for part in file.iter_batches() for record in part.to_pylist()), file.metadata.num_rows


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
