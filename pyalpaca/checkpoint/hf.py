"""Hugging Face folders: config.json, pytorch_model*.bin or model*.safetensors, sharded or not, and tokenizer files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyalpaca.checkpoint import tokens
from pyalpaca.checkpoint.canonical import Reader, check_shapes, parse_config, total_bytes
from pyalpaca.checkpoint.container.safetensors_file import safetensors_layout
from pyalpaca.checkpoint.container.tensor_file import dtype_name, read_json
from pyalpaca.checkpoint.container.torch_file import open_tensors
from pyalpaca.checkpoint.container.torch_layout import DEFAULT_CONTAINER, torch_layout
from pyalpaca.checkpoint.plan import Checksums, Plan, as_it_is, execute
from pyalpaca.checkpoint.tokens import write_json
from pyalpaca.model import config_from_hf, config_to_hf, natural_key

KINDS = {"safetensors": "model", "bin": "pytorch_model"}
WEIGHTS = re.compile(r"(pytorch_model|model)(-\d+-of-\d+)?\.(bin|safetensors)(\.index\.json)?")


def is_hf(path: Path) -> bool:
    """Whether a folder holds Hugging Face weights."""
    return any(WEIGHTS.fullmatch(f.name) for f in path.iterdir())


def open_hf(path: Path, vocab_size: int | None = None) -> Reader:
    """Open a Hugging Face folder.

    vocab_size replaces that of config.json. Raises ValueError or FileNotFoundError for a missing or damaged file, a name in
    an index that leaves the folder, and tensors that are not those of config.json.
    """
    fields = read_json(path / "config.json")
    if vocab_size is not None:
        fields = {**fields, "vocab_size": vocab_size}
    files = {name: open_tensors(path / name) for name in _shard_names(path)}
    num_tensors = sum(len(file.shapes) for file in files.values())
    config = parse_config(path / "config.json", lambda: config_from_hf(fields), num_tensors)
    weight_map: dict[str, str] = {}
    for name, file in files.items():
        for key in file.shapes:
            if key in weight_map:
                raise ValueError(f"{path / name}: {key} is in {weight_map[key]} too; the files are of two models, remove one's")
            if not key.endswith("rotary_emb.inv_freq"):
                weight_map[key] = name
    if config.tie_embeddings:
        weight_map.pop("lm_head.weight", None)
    found = {key: files[name].shapes[key] for key, name in weight_map.items()}
    rows = found.get("model.embed_tokens.weight", (config.vocab_size,))[0]
    if rows != config.vocab_size:
        raise ValueError(
            f"{path / 'config.json'}: vocab_size is {config.vocab_size}, but model.embed_tokens.weight has {rows} rows; "
            f"set vocab_size to {rows}"
        )
    shapes = check_shapes(path, config, found, "the weights and config.json must be of the same LLaMA model")
    extra = [key for key in weight_map if key not in shapes]
    if extra:
        hint = (
            "is this a LoRA adapter's or another model's file?" if "lora" in extra[0] else "expected the tensors of a LLaMA model"
        )
        raise ValueError(
            f"{path / weight_map[extra[0]]}: {extra[0]} is not in a LLaMA model of {config.num_layers} layers; {hint}"
        )
    return Reader(
        layout="hf",
        path=path,
        config=config,
        shapes=shapes,
        dtypes={name: files[weight_map[name]].dtypes[name] for name in shapes},
        fetch=lambda name, piece: files[weight_map[name]].read(name, piece),
        tokenizer=tokens.find(path),
        fields=fields,
        files={name: file for name, file in weight_map.items() if name in shapes},
    )


def _shard_names(path: Path) -> list[str]:
    """The weight files of a folder, safetensors before .bin, from the index or, without one, from their numbered names."""
    for suffix, stem in KINDS.items():
        index = path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _indexed(index)
        if (path / f"{stem}.{suffix}").is_file():
            return [f"{stem}.{suffix}"]
        shards = sorted((f.name for f in path.glob(f"{stem}-*-of-*.{suffix}") if WEIGHTS.fullmatch(f.name)), key=natural_key)
        if shards:
            count = int(re.findall(r"-of-(\d+)", shards[0])[0])
            expected = {f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)}
            if missing := sorted(expected - set(shards), key=natural_key):
                raise FileNotFoundError(f"{path / missing[0]}: not found, {len(shards)} of {count} shards are there; download it")
            if stray := sorted(set(shards) - expected):
                raise ValueError(f"{path / stray[0]}: belongs to another set of shards than {shards[0]}; remove one of the sets")
            return shards
    raise FileNotFoundError(
        f"{path}: no weights found, expected pytorch_model*.bin or model*.safetensors; check that the download is complete"
    )


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names to file names; download it again")
    names = sorted(set(weight_map.values()), key=natural_key)
    for name in names:
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise ValueError(
                f"{index}: names the file {name!r} outside of its own folder, expected plain file names; don't trust it"
            )
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: not found, but {index.name} names it; download it")
    return names


def hf_fields(reader: Reader) -> dict[str, Any]:
    """The config.json of a reader's model: what came with it, with the vocabulary and dtype that the tensors have."""
    dtype = dtype_name(reader.dtypes[reader.names[0]])
    if not reader.fields:
        return config_to_hf(reader.config, dtype)
    fields = {**reader.fields, "vocab_size": reader.config.vocab_size}
    known = [key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype"]
    return {**fields, **dict.fromkeys(known, dtype)}


def write_config(reader: Reader, out: Path) -> None:
    """config.json and generation_config.json of a reader's model."""
    fields = hf_fields(reader)
    write_json(out / "config.json", fields)
    beside = reader.path / "generation_config.json"
    if reader.fields and beside.is_file():
        write_json(out / "generation_config.json", read_json(beside))
    else:
        ids = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if fields.get(key) is not None}
        write_json(out / "generation_config.json", {"_from_model_config": True, **ids})


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1.5GiB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write for instance 5GB or 500MB")
    power = " KMGT".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def plan_shards(reader: Reader, weights: str, max_shard_size: str = "5GB") -> dict[str, str]:
    """{name: file name}: filled in order up to the size; a tensor larger than it gets a file of its own."""
    limit, stem = parse_size(max_shard_size), KINDS[weights]
    groups: list[list[str]] = [[]]
    for name in reader.names:
        if groups[-1] and total_bytes(reader, [*groups[-1], name]) > limit:
            groups.append([])
        groups[-1].append(name)
    n = len(groups)
    files = [f"{stem}.{weights}"] if n == 1 else [f"{stem}-{i:05d}-of-{n:05d}.{weights}" for i in range(1, n + 1)]
    return {name: file for file, group in zip(files, groups, strict=True) for name in group}


def plan_hf(
    reader: Reader,
    *,
    weights: str = "safetensors",
    max_shard_size: str = "5GB",
    files: Mapping[str, str] | None = None,
    container: str = DEFAULT_CONTAINER,
) -> Plan:
    """A Hugging Face folder: weights, index, config.json, generation_config.json and tokenizer files.

    weights: `safetensors` or `bin`. container: of .bin files, which torch.save's layout they follow.
    files: {name: file name}, to lay the tensors out as another folder does, in its order; otherwise shards of at most
    `max_shard_size`.
    """
    if weights not in KINDS:
        raise ValueError(f"weights {weights!r} are not one of {', '.join(KINDS)}")
    if weights != "bin" and container != DEFAULT_CONTAINER:
        raise ValueError(f"container {container} is for files of torch.save, {weights} are written; choose weights bin")
    place = dict(files) if files else plan_shards(reader, weights, max_shard_size)
    layouts = []
    for file in sorted(set(place.values()), key=natural_key):
        specs = {name: (reader.shapes[name], reader.dtypes[name]) for name in place if place[name] == file}
        layouts.append(safetensors_layout(file, specs) if weights == "safetensors" else torch_layout(file, specs, container))
    index = f"{KINDS[weights]}.{weights}.index.json"
    sharded = [file.name for file in layouts] != [f"{KINDS[weights]}.{weights}"]

    def finish(folder: Path, checksums: Checksums) -> None:
        if sharded:
            write_json(folder / index, {"metadata": {"total_size": total_bytes(reader)}, "weight_map": place})
        write_config(reader, folder)
        tokens.copy(reader.tokenizer, folder)

    steps = [as_it_is(place[name], name) for name in reader.names]
    small = (*([index] if sharded else []), "config.json", "generation_config.json", *tokens.present(reader.tokenizer))
    return Plan("hf", reader, layouts, steps, small, finish)


def write_hf(reader: Reader, out: str | Path, **how: Any) -> None:
    """Write a Hugging Face folder; `how` is `plan_hf`'s."""
    execute(plan_hf(reader, **how), out)
