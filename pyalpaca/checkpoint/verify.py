"""Files against the table of published sha256, and weights against a reference: which they are, or in what they differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from tqdm import tqdm

from pyalpaca.checkpoint.canonical import Reader
from pyalpaca.checkpoint.container.tensor_file import check_head
from pyalpaca.checkpoint.container.torch_file import open_torch_tensors
from pyalpaca.checkpoint.diff import TensorDiff, diff
from pyalpaca.checkpoint.digest import combine, tensor_digests
from pyalpaca.checkpoint.open import open_checkpoint
from pyalpaca.checkpoint.published import Published, family, model_named, published
from pyalpaca.checkpoint.resaved import Container, Resaved, container, resaved

_NO_WEIGHTS = r"(?!(training_args|optimizer|scheduler)\.bin$)"
_LOOKED_AT = re.compile(_NO_WEIGHTS + r".+\.(pth|bin|safetensors)|tokenizer\.model")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """What is known of one file.

    status: `OK`, `UNKNOWN` or `MISMATCH`. found: the row that has its hash, or the hash of its tensors as another torch saves
    them; expected: the row whose hash it should have. container: of a file that torch.save wrote, where its hash is in no row.
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
class Comparison:
    """A model's tensors against a reference's, A and B in the words of `differing`.

    tensors: how many the two have. digest, reference_digest: of their contents, see `digest`.
    """

    reference: Path
    tensors: int
    differing: tuple[TensorDiff, ...]
    digest: str
    reference_digest: str


@dataclass(frozen=True)
class Verification:
    """The verdicts on files, and `problems` of the folder as a whole: a missing shard, shards of several models."""

    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]
    comparison: Comparison | None = None

    @property
    def mismatched(self) -> bool:
        differs = self.comparison is not None and bool(self.comparison.differing)
        return differs or bool(self.problems) or any(v.status == "MISMATCH" for v in self.verdicts)

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and every weight file has a published hash, or the weights are the reference's.

        The table knows few tokenizers: another one beside weights is no failure.
        """
        weights = [v for v in self.verdicts if not v.is_tokenizer]
        known = all(v.status == "OK" for v in weights or self.verdicts)
        return not self.mismatched and (known or self.comparison is not None)


@dataclass(frozen=True)
class _Seen:
    """A file with its hash. shapes: of the tensors that torch.save wrote to it; fault: why it can't be read."""

    path: Path
    sha256: str
    found: Published | None = None
    container: Container | None = None
    resaved: Resaved | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    fault: str = ""


def verify(path: str | Path, model: str | None = None, reference: Reader | None = None) -> Verification:
    """Compare a file, or the weight and tokenizer files of a folder, with the table.

    A file whose hash is not in it, but would be if another torch had saved the same tensors, holds the published weights.
    model: which one of the table it should be, in any case of letters. reference: weights that those of the folder (or of the
    file's folder) are compared with, tensor by tensor.
    Raises ValueError or FileNotFoundError for a path without such files, a model that is not in the table, and a folder that
    can't be opened to compare it.
    """
    where, table = Path(path), published()
    asked = model_named(model, table) if model is not None else None
    paths = _files(where)
    opened = open_checkpoint(where if where.is_dir() else where.absolute().parent) if reference is not None else None
    seen = [_look(p, s, table) for p, s in zip(paths, _sums(paths), strict=True)]
    known = {s.found.model for s in seen if s.found and s.found.kind != "tokenizer"}
    tokenizers = {s.found.model for s in seen if s.found and s.found.kind == "tokenizer"}
    models = {asked} if asked else known
    rows = [row for row in table if _possible(row, models, tokenizers)]
    verdicts = tuple(_judge(s, rows, table, models) for s in seen)
    problems = tuple(_problems(verdicts, models, table)) if where.is_dir() else ()
    return Verification(verdicts, problems, compare(opened, reference) if opened and reference else None)


def compare(reader: Reader, reference: Reader) -> Comparison:
    """The tensors of `reader` whose name, shape, dtype or bytes are not those of `reference`, and by how much they differ."""
    ours, theirs = dict(tensor_digests(reader)), dict(tensor_digests(reference))
    unlike = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    parts = [replace(r, shapes={name: r.shapes[name] for name in unlike if name in r.shapes}) for r in (reader, reference)]
    differing = tuple(
        replace(d, reason="equal as numbers, other bytes (0 and -0, or NaN)") if d.equal else d for d in diff(parts[0], parts[1])
    )
    return Comparison(reference.path, len(ours | theirs), differing, combine(ours.values()), combine(theirs.values()))


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


def _look(path: Path, sha256: str, table: Sequence[Published]) -> _Seen:
    """Find a file's hash in the table, or that of its tensors as another torch saves them."""
    by_hash = {row.sha256: row for row in table if not row.announced}
    if sha256 in by_hash:
        return _Seen(path, sha256, by_hash[sha256])
    try:
        check_head(path, "the published file")
        if not _is_torch(path):
            return _Seen(path, sha256)
        file = open_torch_tensors(path)
    except ValueError as error:
        return _Seen(path, sha256, fault=str(error).removeprefix(f"{path}: "))
    box = container(path)
    names = {row.file for row in by_hash.values() if row.may_hold(file.shapes)}
    own = [name for name in dict.fromkeys((path.name, f"{box.folder}{path.suffix}")) if name in names]
    met = resaved(file, box, own or sorted(names), by_hash)
    return _Seen(path, sha256, by_hash[met.sha256] if met else None, box, met, file.shapes)


def _is_torch(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
    return path.suffix in (".pth", ".bin", ".pt") or head == b"PK\3\4" or head[:2] == b"\x80\2"


def _possible(row: Published, models: set[str], tokenizers: set[str]) -> bool:
    """Whether a row can be meant: `models` are asked for or recognised by weights, `tokenizers` recognised."""
    if not models:
        return row.kind == "tokenizer" or not tokenizers or family(row.model) in tokenizers
    return row.model in (models if row.kind != "tokenizer" else {family(m) for m in models})


def _judge(seen: _Seen, rows: Sequence[Published], table: Sequence[Published], models: set[str]) -> Verdict:
    """rows: those of the table that can be meant in this folder."""
    path, found, name = seen.path, seen.found, seen.path.name
    alike = [row for row in rows if fnmatchcase(name, row.file)]
    if not models and seen.shapes is not None:
        alike = [row for row in alike if row.may_hold(seen.shapes)]
    certain = alike[0] if len(alike) == 1 and not alike[0].announced else None
    asked = " or ".join(sorted(models))

    def verdict(status: str, reason: str) -> Verdict:
        return Verdict(path, status, seen.sha256, reason, found, None if status == "OK" else certain, seen.container)

    if found is not None:
        if found not in rows:
            return verdict("MISMATCH", f"is {found}, expected that of {asked}")
        if name != found.file and any(fnmatchcase(name, row.file) for row in table):
            return verdict("MISMATCH", f"is {found} under another name")
        how = f" {seen.resaved.differences}: its tensors are those published" if seen.resaved else ""
        return verdict("OK", f"{found}{how}")
    if seen.fault:
        return verdict("MISMATCH", seen.fault)
    if certain is not None:
        return verdict("MISMATCH", _why_mismatch(certain, seen, "" if models else ", the only model left that has such a file"))
    return verdict("UNKNOWN", _why_unknown(seen, alike, asked))


def _why_mismatch(expected: Published, seen: _Seen, told: str) -> str:
    reason = f"expected {expected} with the sha256 {expected.sha256}{told}"
    if seen.shapes is None:
        return reason
    if not expected.may_hold(seen.shapes):
        return f"{reason}: its weights differ, they have other names or shapes"
    if expected.kind == "merged-pth":  # known to be of torch 1.13, on the CPU; who saved the others, and how, is not
        return f"{reason}: no torch gives its tensors that sha256, its weights differ from those published"
    return (
        f"{reason}: no torch from 1.13 on gives its tensors that sha256, its weights differ from those published, or those were "
        "saved from a GPU or by an older torch"
    )


def _why_unknown(seen: _Seen, alike: Sequence[Published], asked: str) -> str:
    never = ", ".join(row.model for row in alike if row.announced)
    other = ", nor would it be if another torch had saved the file" if seen.shapes is not None else ""
    reason = f"the hash is not in the table{other}"
    if alike and all(row.announced for row in alike):
        return f"{reason}: that of {never} was announced (TBA) and never published"
    if not alike:
        what = seen.path.name + (" with such tensors" if seen.shapes is not None else "")
        return f"{reason}, which has no {what}" + (f" of {asked}" if asked else "")
    more = f"; those of {never} were announced (TBA) and never published" if never else ""
    return f"{reason}, which has {seen.path.name} of {len(alike)} models: --model NAME says which hash to expect{more}"


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
