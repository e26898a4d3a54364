"""The generator: open a model in any layout, fill the cache with the prompt, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pyalpaca.checkpoint import open_checkpoint, tokenizer_folder
from pyalpaca.data import Tokenizer, load_tokenizer, stream_decoder
from pyalpaca.generate.cache import new_cache
from pyalpaca.generate.sampling import Sampling, choose
from pyalpaca.model import Axis, LlamaConfig, Tree, forward, load, load_quantized, parameters, shard
from pyalpaca.parallel import Mesh, broadcast, init_mesh, tensor_axis


@dataclass(frozen=True)
class Model:
    """A model that is ready to generate: this rank's parameters and what is needed to run them."""

    params: Tree
    config: LlamaConfig
    axis: Axis
    mesh: Mesh
    tokenizer: Tokenizer
    cache_dtype: torch.dtype | None = None  # of keys and values, None: the parameters'


def load_model(
    path: str | Path,
    *,
    lora: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    bits: int | None = None,
    group: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Model:
    """Open a checkpoint of any layout on this process's rank. dtype None: the checkpoint's own, fp32 on a CPU.

    bits: 8 or 4 for projections and head stored as integers, `group` of a row sharing a scale (see `pyalpaca.ops.quantize`).
    cache_dtype: what keys and values are kept as, a floating dtype or int8; None: like the parameters.

    ValueError if the tokenizer has more pieces than the model has rows, or the processes are not tp many.
    """
    mesh = init_mesh(tp, timeout_minutes=24 * 60)  # the other ranks wait while a person thinks of the next prompt
    if mesh.world != tp:
        raise ValueError(
            f"{mesh.world} processes for tensor-parallel size {tp}: generation runs on just tp processes; give --tp {mesh.world}"
        )
    reader = open_checkpoint(path, lora=lora, vocab_size=vocab_size)
    where = tokenizer or reader.tokenizer
    if where is None:
        raise ValueError(f"{path}: holds no tokenizer; give the folder of one with --tokenizer")
    if tokenizer is None and reader.tokenizer is not None:
        with tokenizer_folder(reader.tokenizer) as folder:
            words = load_tokenizer(folder)
    else:
        words = load_tokenizer(where)
    if words.vocab_size > reader.config.vocab_size:
        raise ValueError(
            f"{where}: {words.vocab_size} tokens, but the model in {path} has {reader.config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    table = parameters(reader.config)
    try:
        for p in table:
            shard(p, mesh.tp_rank, tp)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if dtype is None:
        dtype = torch.float32 if mesh.device.type == "cpu" else reader.dtype(table[0].name)
    loader = load if bits is None else partial(load_quantized, bits=bits, group=group)
    try:
        params = loader(table, lambda p, piece: reader.read(p.name, piece), dtype, mesh.device, mesh.tp_rank, tp)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Model(params, reader.config, tensor_axis(mesh, reader.config.vocab_size), mesh, words, cache_dtype)


@torch.inference_mode()
def generate_ids(
    model: Model, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None = None, seed: int = 0
) -> Iterator[int]:
    """Yield the ids that follow `prompt`, up to the end token (which is not yielded) or max_new_tokens.

    Every rank yields the same ids. ValueError for an empty prompt or one that leaves no room in the model's positions.
    """
    sampling = sampling or Sampling()
    if not prompt:
        raise ValueError("the prompt is empty; expected at least the begin token")
    limit = model.config.max_positions
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model was made for {limit}; shorten it")
    length = min(len(prompt) + max_new_tokens, limit)
    generator = torch.Generator().manual_seed(seed)
    dtype = model.cache_dtype or model.params["norm"].dtype
    empty = new_cache(model.config, length, dtype, model.mesh.device, parts=model.axis.size)
    seen = torch.tensor([list(prompt)], device=model.mesh.device)
    start, fresh = 0, seen
    while seen.shape[1] < length:
        cache = [layer._replace(start=start) for layer in empty]
        logits_BSV = forward(model.params, fresh, model.config, model.axis, cache=cache, last_only=True)
        token = choose(model.axis.gather_logits(logits_BSV[:, -1]), seen, sampling, generator)
        # One rank decides: a difference in the last bit of the logits must not split the ranks.
        token = broadcast(token, model.mesh.tp_group)
        if int(token) == model.tokenizer.eos_id:
            return
        yield int(token)
        start, fresh = seen.shape[1], token.unsqueeze(0)
        seen = torch.cat([seen, fresh], 1)


def generate_text(
    model: Model,
    prompt: str,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_ids: Callable[[int], None] = lambda _: None,
) -> Iterator[str]:
    """Yield the answer to `prompt` as it grows; joined, the pieces are the answer. Ends before the first stop string.

    The begin token is put before the prompt. on_ids hears of every generated id.
    """
    add, end = stream_decoder(model.tokenizer)
    held = ""
    longest = max((len(s) for s in stop), default=0)
    # The prompt passes through the decoder first: only its first piece loses the space that encoding put there.
    ids = model.tokenizer.encode(prompt, bos=True)
    for token in ids:
        add(token)
    for token in generate_ids(model, ids, max_new_tokens, sampling, seed):
        on_ids(token)
        held += add(token)
        found = [held.index(s) for s in stop if s in held]
        if found:
            yield held[: min(found)]
            return
        # What may be the beginning of a stop string waits for the next token.
        safe = len(held) - next(
            (n for n in range(min(longest - 1, len(held)), 0, -1) if any(s.startswith(held[-n:]) for s in stop)), 0
        )
        if safe:
            yield held[:safe]
            held = held[safe:]
    held += end()
    if held:
        yield held
