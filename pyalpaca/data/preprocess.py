"""Records to a prepared data set: read, encode in several processes, write in the order of the records."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pyalpaca.data.indexed import indexed_writer
from pyalpaca.data.instruction import HANDLERS, PRETRAIN, encode_record, encode_text
from pyalpaca.data.prompts import find_template
from pyalpaca.data.records import Record, read_records
from pyalpaca.data.tokenizer import load_tokenizer

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
INSTRUCTION_KEYS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Job:
    """What to prepare. `seq_length` None: as long as the template's own trainer allows, mostly without an end."""

    input: Path
    output_prefix: str
    tokenizer: Path
    handler: str = PRETRAIN
    prompt_template: str = "ascendspeed"
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    seq_length: int | None = None
    workers: int = 1
    log_interval: int = 100

    @property
    def limit(self) -> int | None:
        """Where a sequence is cut, in ids."""
        if self.seq_length is None and self.handler != PRETRAIN:
            return find_template(self.prompt_template).max_length
        return self.seq_length

    @property
    def prefixes(self) -> dict[str, str]:
        """The prefix of the .bin and .idx of each key; instruction data is marked as packed, as its readers expect."""
        if self.handler == PRETRAIN:
            return {key: f"{self.output_prefix}_{key}_document" for key in self.json_keys}
        return {key: f"{self.output_prefix}_packed_{key}_document" for key in INSTRUCTION_KEYS}


@dataclass(frozen=True)
class Summary:
    """What was written. `cut` sequences were longer than allowed, `unended` ones lack an end token, `learnt` counts labels."""

    prefixes: tuple[str, ...]
    records: int
    sequences: int
    tokens: int
    learnt: int
    longest: int
    cut: int
    unended: int
    vocab_size: int


class Encoded(NamedTuple):
    """One sequence of a record: its columns by key, (length,) int32 each, and whether it was cut."""

    columns: dict[str, npt.NDArray[np.int32]]
    cut: bool


def encode(job: Job, item: tuple[int, Record]) -> list[Encoded]:
    """The sequences of one record, given with its number from 1. ValueError naming file and number if the record is bad."""
    number, record = item
    tokenizer = _tokenizer(job.tokenizer)
    where = f"{job.input}: record {number}"
    if job.handler == PRETRAIN:
        texts = {key: encode_text(record, key, where, tokenizer, job.append_eod, job.limit) for key in job.json_keys}
        return [_pack({key: sample.input_ids}, sample.cut) for key, sample in texts.items() if sample is not None]
    template = find_template(job.prompt_template)
    samples = encode_record(HANDLERS[job.handler], record, where, tokenizer, template, job.append_eod, job.limit)
    return [_pack({key: getattr(sample, key) for key in INSTRUCTION_KEYS}, sample.cut) for sample in samples]


def _pack(columns: dict[str, list[int]], cut: bool) -> Encoded:
    # Arrays, because lists of numbers cost more to send to another process than the text to encode.
    return Encoded({key: np.array(column, np.int32) for key, column in columns.items()}, cut)


# Once a process: records come one by one, and a worker gets no more than the path of its tokenizer.
_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


def preprocess(job: Job) -> Summary:
    """Prepare the data set of a job; all its files appear together at the end, or none.

    FileNotFoundError or ValueError: the tokenizer, the file or a record is not as it should be, or there is none.
    """
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    if job.handler not in (PRETRAIN, *HANDLERS):
        raise ValueError(f"handler {job.handler!r} is not known, expected one of {', '.join([PRETRAIN, *HANDLERS])}")
    if job.workers < 1 or job.log_interval < 1:
        raise ValueError(f"--workers is {job.workers} and --log-interval {job.log_interval}, expected at least 1 for both")
    if job.limit is not None and job.limit < 2:
        raise ValueError(f"--seq-length is {job.limit}, expected at least 2: a token to read and a token to learn")
    tokenizer = _tokenizer(job.tokenizer)
    records, total = read_records(job.input)
    totals: Counter[str] = Counter(records=0, sequences=0, tokens=0, learnt=0, longest=0, cut=0, unended=0)
    with ExitStack() as stack:
        writers = {key: stack.enter_context(indexed_writer(prefix)) for key, prefix in job.prefixes.items()}
        documents = _in_order(partial(encode, job), enumerate(records, start=1), job.workers)
        for document in tqdm(
            documents, "encode", total, miniters=job.log_interval, mininterval=0, unit="record", file=sys.stderr
        ):
            totals["records"] += 1
            for encoded in document:
                for key, column in encoded.columns.items():
                    writers[key].add(column)
                _count(totals, encoded, tokenizer.eos_id)
            for key in {key for encoded in document for key in encoded.columns}:
                writers[key].end_document()
        if not totals["sequences"]:
            raise ValueError(f"{job.input}: none of its {totals['records']} records gave a sequence; check its content")
    return Summary(prefixes=tuple(job.prefixes.values()), vocab_size=tokenizer.vocab_size, **totals)


def _count(totals: Counter[str], encoded: Encoded, eos_id: int) -> None:
    columns = list(encoded.columns.values())  # input_ids first and labels last, or a text that is both
    ids, labels = columns[0], columns[-1]
    totals["sequences"] += 1
    totals["tokens"] += len(ids)
    totals["learnt"] += int(np.count_nonzero(labels >= 0))
    totals["longest"] = max(totals["longest"], len(ids))
    totals["cut"] += encoded.cut
    totals["unended"] += not encoded.cut and int(ids[-1]) != eos_id


def _in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> Iterator[_Result]:
    """`function` of each item, in the order of the items, computed in `workers` processes."""
    if workers == 1:
        yield from map(function, items)
        return
    # Fresh processes (spawn): a fork would copy the locks of whatever threads this process has.
    with get_context("spawn").Pool(workers) as pool:
        items = iter(items)
        # Bounded windows: the pool would otherwise read the whole input ahead.
        while window := list(islice(items, 1024 * workers)):
            yield from pool.imap(function, window, chunksize=64)
