"""Files against the table of published sha256: which one it is, which one it should be, or that a hash can't decide."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from pyalpaca.checkpoint.container.tensor_file import check_head
from pyalpaca.checkpoint.digest import digest
from pyalpaca.checkpoint.open import open_checkpoint

_LOOKED_AT = re.compile(r".+\.(pth|bin|safetensors)|tokenizer\.model")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A row of the table. sha256: hex, or `TBA` where it was announced and never published; `file` is then a pattern."""

    model: str
    file: str
    sha256: str
    kind: str

    @property
    def announced(self) -> bool:
        return self.sha256 == "TBA"


@dataclass(frozen=True)
class Container:
    """What the zip archive that torch.save writes says of its writer: its folder and its records besides the tensors."""

    folder: str
    version: str
    byteorder: str
    records: tuple[str, ...]

    @property
    def writer(self) -> str:
        """byteorder and .data/serialization_id came with torch 2.1, the zip archive itself with 1.6."""
        newer = {"byteorder", ".data/serialization_id"} & set(self.records)
        return "torch 2.1 or newer" if newer else "torch 1.6 to 2.0, as the published files (1.13)"

    def __str__(self) -> str:
        said = {"version": f"version {self.version}", "byteorder": f"byteorder {self.byteorder}"}
        records = ", ".join(said.get(name, name) for name in self.records[:8])  # a strange archive may have thousands
        text = f"container: folder {self.folder}/ with the records {records}; written by {self.writer}"
        return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True)
class Verdict:
    """What is known of one file.

    status: `OK`, `UNKNOWN` or `MISMATCH`. found: the row that has its hash; expected: the row whose hash it should have.
    """

    path: Path
    status: str
    sha256: str
    reason: str
    found: Published | None = None
    expected: Published | None = None
    container: Container | None = None

    @property
    def is_tokenizer(self) -> bool:
        return self.path.name == "tokenizer.model" or (self.found is not None and self.found.kind == "tokenizer")


@dataclass(frozen=True)
class Verification:
    """The verdicts on files, and `problems` of the folder as a whole: a missing shard, shards of several models.

    digest: of the model's content, where the hash of a torch.save file did not match; digest_error: why there is none.
    """

    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]
    digest: str | None = None
    digest_error: str | None = None

    @property
    def mismatched(self) -> bool:
        return bool(self.problems) or any(v.status == "MISMATCH" for v in self.verdicts)

    @property
    def ok(self) -> bool:
        """Every weight file has a published hash. The table knows few tokenizers: another one beside weights is no failure."""
        weights = [v for v in self.verdicts if not v.is_tokenizer]
        return not self.mismatched and all(v.status == "OK" for v in weights or self.verdicts)


def published() -> tuple[Published, ...]:
    """The table that ships with the package: 60 published hashes and 4 that were announced only."""
    lines = files("pyalpaca.checkpoint").joinpath("data", "sha256.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Published(*line.split("\t")) for line in lines[1:])


def verify(path: str | Path, model: str | None = None) -> Verification:
    """Compare a file, or the weight and tokenizer files of a folder, with the table.

    model: which one of the table it should be, in any case of letters.
    Raises ValueError or FileNotFoundError for a path without such files and a model that is not in the table.
    """
    where, table = Path(path), published()
    asked = _model(model, table) if model is not None else None
    paths = _files(where)
    sums = _sums(paths)
    by_hash = {row.sha256: row for row in table if not row.announced}
    found = [by_hash.get(s) for s in sums]
    models = {asked} if asked else {row.model for row in found if row and row.kind != "tokenizer"}
    rows = [row for row in table if _possible(row, models, {row.model for row in found if row and row.kind == "tokenizer"})]
    verdicts = tuple(_judge(p, s, row, rows, table, models) for p, s, row in zip(paths, sums, found, strict=True))
    problems = tuple(_problems(verdicts, models, table)) if where.is_dir() else ()
    if not any(v.container and v.status != "OK" and not v.path.name.startswith("adapter_model") for v in verdicts):
        return Verification(verdicts, problems)
    try:
        return Verification(verdicts, problems, digest(open_checkpoint(where if where.is_dir() else where.absolute().parent)))
    except (ValueError, OSError) as error:
        return Verification(verdicts, problems, digest_error=str(error))


def container(path: Path) -> Container | None:
    """What a zip archive of torch.save says of its writer; None if it is no zip archive. ValueError if it is damaged."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            folder = names[0].split("/")[0]
            inside = [name.removeprefix(f"{folder}/") for name in names]
            records = tuple(sorted(n for n in inside if n != "data.pkl" and not n.startswith("data/")))
            if "data.pkl" not in inside:
                raise ValueError("no data.pkl in it, as torch.save writes")
            said = {}
            for name in {"version", "byteorder"} & set(records):
                with archive.open(f"{folder}/{name}") as record:
                    said[name] = record.read(16).decode("ascii", "replace").strip()
    except Exception as error:  # a damaged archive raises anything
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{path}: is truncated, damaged or not written by torch.save ({path.stat().st_size} bytes, {reason}); download or "
            "write it again"
        ) from None
    return Container(folder, said.get("version", ""), said.get("byteorder", ""), records)


def _model(name: str, table: Sequence[Published]) -> str:
    """The table's spelling of a model's name; Meta says 30B for 33B."""
    known = {row.model.lower(): row.model for row in table}
    key = re.sub(r"\b30b$", "33b", name.strip().lower())
    if key not in known:
        near = get_close_matches(key, known, n=3, cutoff=0.5) or list(known)[:3]
        raise ValueError(
            f"model {name!r}: not in the table of published hashes; it has {', '.join(known[k] for k in near)} and others, "
            "in sizes 7B, 13B and 33B"
        )
    return known[key]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, expected a weight or tokenizer file, or a folder of them; check the path")
    found = sorted(f for f in path.iterdir() if f.is_file() and _LOOKED_AT.fullmatch(f.name))
    if not found:
        present = ", ".join(sorted(f.name for f in path.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{path}: no weight or tokenizer file in it (it holds {present}), expected *.pth, *.bin, *.safetensors or "
            "tokenizer.model; give the folder that holds them itself"
        )
    return found


def _sums(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file, hex."""
    sums = []
    size = sum(p.stat().st_size for p in paths)
    with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="sha256", disable=None) as bar:
        for path in paths:
            total = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    total.update(chunk)
                    bar.update(len(chunk))
            sums.append(total.hexdigest())
    return sums


def _family(model: str) -> str:
    """The name under which the table has the model's tokenizer: Chinese-Alpaca of Chinese-Alpaca-Plus-7B."""
    return re.sub(r"(-Plus|-Pro)?-\d+B$", "", model)


def _possible(row: Published, models: set[str], tokenizers: set[str]) -> bool:
    """Whether a row can be meant: `models` are asked for or recognised by weights, `tokenizers` recognised."""
    if not models:
        return row.kind == "tokenizer" or not tokenizers or _family(row.model) in tokenizers
    return row.model in (models if row.kind != "tokenizer" else {_family(m) for m in models})


def _judge(
    path: Path, sha256: str, found: Published | None, rows: Sequence[Published], table: Sequence[Published], models: set[str]
) -> Verdict:
    """rows: those of the table that can be meant in this folder."""
    name = path.name
    alike = [row for row in rows if fnmatchcase(name, row.file)]
    certain = alike[0] if len(alike) == 1 and not alike[0].announced else None
    asked = " or ".join(sorted(models))
    if found is not None:
        what = f"{found.model} {found.file} ({found.kind})"
        if found not in rows:
            return Verdict(path, "MISMATCH", sha256, f"is {what}, expected that of {asked}", found, certain)
        if name != found.file and any(fnmatchcase(name, row.file) for row in table):
            return Verdict(path, "MISMATCH", sha256, f"is {what} under another name", found, certain)
        return Verdict(path, "OK", sha256, what, found)
    try:
        check_head(path, "the published file")
        box = container(path)
    except ValueError as error:
        return Verdict(path, "MISMATCH", sha256, str(error).removeprefix(f"{path}: "), expected=certain)
    if certain is not None:
        told = "" if models else ", the only model left that has such a file"
        reason = f"expected {certain.model} {certain.file} ({certain.kind}) with the sha256 {certain.sha256}{told}"
    else:
        reason = _why_unknown(name, alike, asked)
    if path.suffix == ".pth" and box is None:
        reason += "; it is no zip archive, so torch before 1.6 wrote it, or something else than torch"
    return Verdict(path, "MISMATCH" if certain else "UNKNOWN", sha256, reason, expected=certain, container=box)


def _why_unknown(name: str, alike: Sequence[Published], asked: str) -> str:
    never = ", ".join(row.model for row in alike if row.announced)
    reason = "the hash is not in the table"
    if alike and all(row.announced for row in alike):
        return f"{reason}: that of {never} was announced (TBA) and never published"
    if not alike:
        return f"{reason}, which has no {name}" + (f" of {asked}" if asked else "")
    more = f"; those of {never} were announced (TBA) and never published" if never else ""
    return f"{reason}, which has {name} of {len(alike)} models: --model NAME says which hash to expect{more}"


def _problems(verdicts: Sequence[Verdict], models: set[str], table: Sequence[Published]) -> list[str]:
    """What is wrong with a folder as a whole."""
    shards = {v.found.model for v in verdicts if v.status == "OK" and v.found and v.found.kind not in ("lora", "tokenizer")}
    if len(shards) > 1:
        return [f"the files are of several models: {', '.join(sorted(shards))}"]
    if len(models) != 1:
        return []
    present = {v.path.name for v in verdicts} | {v.found.file for v in verdicts if v.found}
    own = [row for row in table if row.model in models and not row.announced]
    kinds = {row.kind for row in own if row.file in present}
    return [f"{row.file} of {row.model} is missing" for row in own if row.kind in kinds and row.file not in present]
