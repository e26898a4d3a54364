"""`pyalpaca demo --real-width`: one layer of the 7B, the real vocabularies, the same road; checked against transformers."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyalpaca.demo.make_model import RECORDS
from pyalpaca.demo.road import Road, fresh

_DATA = Path(__file__).parent / "data"
_PROMPT = "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。"
_NEW_TOKENS = 10
_SEQ_LENGTH, _BATCH = 96, 4


def make(out: Path, tokenizers: Path, seed: int) -> None:
    """Write out/llama/7B-one-layer in Meta's format and the two adapters, with random weights of the usual spread, fp16."""
    from dataclasses import replace

    from pyalpaca.checkpoint import memory_reader, write_adapter, write_meta
    from pyalpaca.data import load_tokenizer
    from pyalpaca.files import atomic_folder
    from pyalpaca.model import LlamaConfig, initial, lora_parameters, parameters

    config = LlamaConfig(32000, 4096, 11008, 1, 32, 32, 128)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with atomic_folder(out) as folder:
        base = {p.name: initial(p, seed).half() for p in parameters(config)}
        write_meta(memory_reader(config, base, None), folder / "llama" / "7B-one-layer")
        shutil.copyfile(_DATA / "llama-tokenizer.model", folder / "llama" / "tokenizer.model")
        del base
        for i, (name, r) in enumerate((("chinese-llama-plus", 8), ("chinese-alpaca-plus", 64)), 1):
            tokenizer = tokenizers / name
            larger = replace(config, vocab_size=load_tokenizer(tokenizer).vocab_size)
            full = [p for p in parameters(larger) if p.path in ("embed", "head")]
            # B is zero before training; some spread of its own stands for a trained adapter.
            factors = lora_parameters(parameters(larger), r, targets)
            tensors = {p.name: initial(replace(p, path=f"{p.path}.trained"), seed + i).half() for p in [*full, *factors]}
            write_adapter(folder / name, tensors, r=r, lora_alpha=4 * r, target_modules=targets, tokenizer=tokenizer)


def _descendants(root: int) -> Iterator[int]:
    """The processes below `root`, itself included (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents.setdefault(int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(int(entry.name))
            except (OSError, IndexError):
                continue  # it has ended in the meantime
    pending = [root]
    while pending:
        process = pending.pop()
        yield process
        pending += parents.get(process, [])


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Watch this process and all below it; the list's last element becomes the largest sum of their memory in bytes.

    Proportional set size: private pages, and each process's share of the common ones, mapped files included. 0 where
    /proc is missing.
    """
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            total = 0
            for process in _descendants(os.getpid()):
                try:
                    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                except OSError:
                    continue
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch, daemon=True)
    if Path("/proc/self/smaps_rollup").exists():
        thread.start()
    try:
        yield peak
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def walk(folder: Path, seed: int) -> dict[str, object]:
    """Run the road in `folder` and remove its 7 GB of weights again; the summary."""
    began = time.perf_counter()
    fresh(folder)
    road = Road(folder)
    tokenizers, model, hf, merged = folder / "tokenizers", folder / "model", folder / "llama-hf", folder / "merged-hf"
    megatron, data, run = folder / "megatron-tp4", folder / "data" / "alpaca", folder / "run-tp4"
    with peak_memory() as peak:
        road.say("The real vocabularies, merged: 32000 -> 49953 -> 49954")
        merge = [*road.tool("merge_tokenizer/merge_tokenizers.py"), "--llama_tokenizer_dir", str(_DATA / "llama-tokenizer.model")]
        merge += ["--chinese_sp_model_file", str(_DATA / "chinese_sp.model")]
        for name, pad in (("chinese-llama-plus", []), ("chinese-alpaca-plus", ["--add_pad"])):
            road.run([*merge, "--output_dir", str(tokenizers / f"{name}-merged"), *pad])
            shutil.move(tokenizers / f"{name}-merged" / "merged_tokenizer_hf", tokenizers / name)

        road.say("One layer of the 7B in Meta's format, and two adapters, random weights")
        road.run(
            [
                "python",
                "-m",
                "pyalpaca.demo.real_width",
                "--make",
                str(model),
                "--tokenizers",
                str(tokenizers),
                "--seed",
                str(seed),
            ]
        )

        road.say("Meta -> Hugging Face -> merged -> tensor-parallel 4")
        convert = road.tool("convert_llama_weights_to_hf.py")
        road.run([*convert, "--input_dir", str(model / "llama"), "--model_size", "7B-one-layer", "--output_dir", str(hf)])
        lora = f"{model / 'chinese-llama-plus'},{model / 'chinese-alpaca-plus'}"
        merge = [*road.tool("merge_llama_with_chinese_lora_low_mem.py"), "--base_model", str(hf), "--lora_model", lora]
        road.run([*merge, "--output_type", "huggingface", "--output_dir", str(merged)])
        cut = road.tool("ckpt_convert/llama/convert_weights_from_huggingface.py")
        road.run(
            [*cut, "--input-model-dir", str(merged), "--output-model-dir", str(megatron), "--tensor-model-parallel-size", "4"]
        )

        road.say("Prepare the instructions, and one training step on 4 processes (LoRA)")
        prepare = [*road.tool("preprocess_data.py"), "--input", str(RECORDS), "--output-prefix", str(data), "--append-eod"]
        road.run([*prepare, "--tokenizer-name-or-path", str(merged), "--handler-name", "GeneralInstructionHandler"])
        torchrun = ["torchrun", "--standalone", "--nproc_per_node", "4", "-m"]
        recipe = f"--steps 1 --lr-schedule constant --seq-length {_SEQ_LENGTH} --seed {seed} --lora-r 8".split()
        recipe += f"--tp 4 --global-batch-size {_BATCH} --micro-batch-size 2".split()
        train = ["pyalpaca.train", "--model", str(megatron), "--data", str(data), "--output", str(run)]
        road.run([*torchrun, *train, "--lora-full", "", *recipe])

        road.say(f"Generate {_NEW_TOKENS} tokens on 4 processes")
        answers = folder / "answers.jsonl"
        ask = ["pyalpaca.generate", "--model", str(megatron), "--tp", "4", "--prompt", _PROMPT, "--output", str(answers)]
        road.run([*torchrun, *ask, "--max-new-tokens", str(_NEW_TOKENS)])
        ids = json.loads(answers.read_text(encoding="utf-8"))["ids"]
        loss = json.loads((run / "metrics.jsonl").read_text())["loss"]
    equal = _equal_to_transformers(merged, data, ids, loss, seed) if find_spec("transformers") else None
    for heavy in (model, hf, merged, megatron, run):
        shutil.rmtree(heavy)
    return {
        "steps": 1,
        "loss_first": loss,
        "tokens": ids,
        "transformers_equal": equal,
        "peak_memory_gb": round(peak[-1] / 1e9, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _equal_to_transformers(merged: Path, data: Path, ids: list[int], loss: float, seed: int) -> bool:
    """Whether transformers, on the merged folder and in fp32, generates the same ids and has the same loss on the same batch."""
    import torch
    import torch.nn.functional as F
    import transformers

    from pyalpaca.data import batch, load_tokenizer, open_instruction_data

    print("\ntransformers on the merged folder:", flush=True)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32)
    prompt = torch.tensor([load_tokenizer(merged).encode(_PROMPT, bos=True)])
    with torch.inference_mode():
        theirs = model.generate(prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :].tolist()
        tokens, labels = batch(open_instruction_data(data), 0, _BATCH, seed, _SEQ_LENGTH)
        their_loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    print(f"tokens  ours {ids}\n      theirs {theirs}\nloss    ours {loss:.6f}\n      theirs {their_loss:.6f}")
    return theirs == ids and abs(their_loss - loss) <= 1e-4 * their_loss


def main(argv: Sequence[str] | None = None) -> int:
    """Make the random model and adapters: a step of the demo, as a command of its own."""
    p = argparse.ArgumentParser(
        prog="python -m pyalpaca.demo.real_width", description="One layer of the 7B and two adapters, random weights."
    )
    p.add_argument("--make", required=True, type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--tokenizers", required=True, type=Path, metavar="DIR", help="folder with the adapters' tokenizers")
    p.add_argument("--seed", type=int, default=42, help="of the weights (default 42)")
    args = p.parse_args(argv)
    make(args.make, args.tokenizers, args.seed)
    return 0


if __name__ == "__main__":
    from pyalpaca.cli import run

    run(main)
