"""Make what a newcomer lacks: a small LLaMA in Meta's format and two Chinese LoRA adapters, all trained a little.

Only the size is small. The files are those of LLaMA (two shards), of Chinese-LLaMA-Plus (a larger vocabulary, embedding and
head in full) and of Chinese-Alpaca-Plus (one token more, another rank).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pyalpaca.checkpoint import Reader

RECORDS = Path(__file__).parent / "data" / "records.json"
BASE_PIECES, CHINESE_PIECES = 640, 1279
_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def train_tokenizer(texts: Iterable[str], pieces: int, out: Path) -> None:
    """A SentencePiece model with LLaMA's settings: BPE, single digits, byte fallback, ids unk 0, bos 1, eos 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99995,
        num_threads=1,
        minloglevel=2,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())


def extend_vocabulary(reader: Reader, rows: int, seed: int) -> Reader:
    """The model with `rows` rows in embedding and head; new ones start at the mean of the old ones, slightly apart."""
    from dataclasses import replace

    import torch

    from pyalpaca.checkpoint import memory_reader

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in reader.names:
        tensor = reader.read(name).float()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            noise = torch.randn(rows - len(tensor), tensor.shape[1], generator=generator)
            tensor = torch.cat([tensor, tensor.mean(0) + 0.02 * noise])
        tensors[name] = tensor
    return memory_reader(replace(reader.config, vocab_size=rows), tensors, None)


def _text(record: dict[str, str]) -> str:
    return "\n".join(part for part in (record["instruction"], record["input"], record["output"]) if part)


def _chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def make(out: Path, seed: int = 42, steps: int = 40, num_heads: int = 4) -> None:
    """Write out/llama/tiny (Meta), out/chinese-llama-plus and out/chinese-alpaca-plus (PEFT).

    steps: of the base model's training. num_heads: of 64 dimensions each; more than 4 is for trying wide tensor parallelism.
    """
    import torch

    from pyalpaca.checkpoint import cast, memory_reader, native_tensors, open_checkpoint, write_adapter, write_meta, write_native
    from pyalpaca.data import TEMPLATES, Job, generation_prompt, merge_tokenizers, preprocess, write_tokenizer_folder
    from pyalpaca.files import atomic_folder
    from pyalpaca.model import LlamaConfig, flatten, init, parameters
    from pyalpaca.train import TrainConfig, train

    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    texts = [_text(r) for r in records]
    english, chinese = [t for t in texts if not _chinese(t)], [t for t in texts if _chinese(t)]
    with atomic_folder(out) as folder:
        work = folder / "work"

        def learn(model: Reader, name: str, data: Path, steps: int, **settings: object) -> Path:
            """Train `model` on a prepared data set; the run's folder. The log of these small runs is not the user's concern."""
            print(f"{name}: {model.config.vocab_size} tokens, {steps} steps", file=sys.stderr)
            write_native(model, work / f"{name}-start")
            run = TrainConfig(
                model=str(work / f"{name}-start"),
                data=str(data),
                output=str(work / name),
                steps=steps,
                seed=seed,
                micro_batch_size=16,
                **{"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 5, "seq_length": 64, **settings},  # type: ignore[arg-type]
            )
            with redirect_stdout(io.StringIO()):
                train(run)
            return work / name

        def prepare(name: str, lines: Sequence[str], tokenizer: Path) -> Path:
            source = work / f"{name}.txt"
            source.write_text("\n".join(lines) + "\n", encoding="utf-8")
            preprocess(Job(source, str(work / name), tokenizer, append_eod=True))
            return work / name

        # The base: an English vocabulary. It knows the words of the prompts, which would else be the longest part of a sample.
        words = work / "llama.model"
        prompts = [line for t in TEMPLATES.values() for line in generation_prompt(t, "").splitlines() if line]
        train_tokenizer(english + 10 * prompts, BASE_PIECES, words)
        width = 64 * num_heads
        config = LlamaConfig(BASE_PIECES, width, -(-width * 8 // 3 // 256) * 256, 4, num_heads, num_heads, 64)
        table = parameters(config)
        fresh = flatten(init(table, seed))
        start = memory_reader(config, {p.name: fresh[p.path] for p in table}, None)
        run = learn(start, "base", prepare("english", english, words), steps, data_type="text")
        base = cast(open_checkpoint(run), torch.float16)
        write_meta(base, folder / "llama" / "tiny", num_shards=2)
        (folder / "llama" / "tokenizer.model").write_bytes(words.read_bytes())

        # Two adapters, the second trained on top of the first: their vocabularies grow, 8 divides neither.
        train_tokenizer(chinese, CHINESE_PIECES, work / "chinese.model")
        reader, merged, adapters = base, work / "merged.model", list[Path]()
        for name, r, alpha, weights in (("chinese-llama-plus", 8, 32, "bin"), ("chinese-alpaca-plus", 16, 64, "safetensors")):
            rows = merge_tokenizers(words, work / "chinese.model", merged, add_pad=name == "chinese-alpaca-plus")
            data = prepare(name, chinese if weights == "bin" else texts, merged)
            settings = {"lora_r": r, "lora_alpha": float(alpha), "lora_targets": _TARGETS, "data_type": "text"}
            run = learn(extend_vocabulary(reader, rows, seed), name, data, steps // 2, **settings)
            tensors = native_tensors(run, "model")
            learnt = [n for n in tensors.shapes if ".lora_" in n or n in ("model.embed_tokens.weight", "lm_head.weight")]
            write_tokenizer_folder(merged, work / f"{name}-tokenizer")
            write_adapter(
                folder / name,
                {n: tensors.read(n, None) for n in learnt},
                r=r,
                lora_alpha=alpha,
                target_modules=_TARGETS.split(","),
                weights=weights,
                tokenizer=work / f"{name}-tokenizer",
            )
            adapters.append(folder / name)
            reader = open_checkpoint(folder / "llama" / "tiny", lora=adapters)
        shutil.rmtree(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model and the adapters in --output-dir."""
    p = argparse.ArgumentParser(prog="python -m pyalpaca.demo.make_model", description=__doc__)
    p.add_argument(
        "--output-dir", required=True, type=Path, help="folder to write llama/, chinese-llama-plus/, chinese-alpaca-plus/ to"
    )
    p.add_argument("--seed", type=int, default=42, help="the same seed makes the same files (default 42)")
    p.add_argument("--steps", type=int, default=40, help="training steps of the base model; the adapters take half (default 40)")
    p.add_argument("--num-heads", type=int, default=4, help="heads of 64 dimensions; 8 for trying tensor-parallel 8 (default 4)")
    args = p.parse_args(argv)
    make(args.output_dir, args.seed, args.steps, args.num_heads)
    for path in sorted(args.output_dir.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>12,} B  {path}")
    return 0


if __name__ == "__main__":
    from pyalpaca.cli import run

    run(main)
