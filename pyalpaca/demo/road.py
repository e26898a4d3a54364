"""`pyalpaca demo`: the whole road on a small model. Every step is a command that a user could type; it is printed, then run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pyalpaca.demo.make_model import RECORDS

_MARK = ".pyalpaca-demo"
_TRAINED = 20  # percent of the records that are trained on, few enough to be learnt in a minute
_QUESTIONS = 4


class Road:
    """Where the demo's files are, and how its commands are shown and run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = Path(__file__).resolve().parents[2] / "tools"
        self.step = 0

    def say(self, text: str) -> None:
        self.step += 1
        print(f"\n== {self.step}. {text}", flush=True)

    def tool(self, path: str) -> list[str]:
        """The command of a script in tools/; from an installed package, what stands behind it."""
        if (self.tools / path).is_file():
            return ["python", str(Path(os.path.relpath(self.tools)) / path)]
        return ["python", "-m", "pyalpaca.commands", Path(path).stem]

    def run(self, command: Sequence[str], *, capture: bool = False) -> str:
        """Print a command, run it, return what it printed if `capture`; ValueError if it fails."""
        print(f"$ {shlex.join(command)}", flush=True)
        real = list(command)
        environment = dict(os.environ)
        if real[0] == "torchrun":
            real[:1] = [sys.executable, "-m", "torch.distributed.run"]
            environment.setdefault("OMP_NUM_THREADS", "1")
        elif real[0] == "pyalpaca":
            real[:1] = [sys.executable, "-m", "pyalpaca.cli"]
        else:
            real[0] = sys.executable
        process = subprocess.Popen(
            real, stdout=subprocess.PIPE if capture else None, text=True, env=environment, encoding="utf-8"
        )
        output = ""
        if process.stdout is not None:
            while piece := process.stdout.read(1):
                output += piece
                print(piece, end="", flush=True)
        if process.wait():
            raise ValueError(f"the command above ended with status {process.returncode}; its own message stands before this line")
        return output


def fresh(folder: Path) -> None:
    """An empty folder for the demo; only what an earlier demo left is deleted."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ValueError(f"{folder}: holds files that no demo wrote; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def _questions() -> list[str]:
    """Some instructions of the training set that stand without an input, Chinese and English."""
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    records = records[: len(records) * _TRAINED // 100]
    alone = [r["instruction"] for r in records if not r["input"]]
    return alone[:: len(alone) // _QUESTIONS][:_QUESTIONS]


def walk(folder: Path, seed: int, steps: int) -> dict[str, object]:
    """Run the eight steps in `folder`; the demo's summary."""
    began = time.perf_counter()
    fresh(folder)
    road = Road(folder)
    model, hf, merged, pth = folder / "model", folder / "llama-hf", folder / "merged-hf", folder / "merged-pth"
    megatron, data = folder / "megatron-tp2-pp2", folder / "data" / "alpaca"
    lora = f"{model / 'chinese-llama-plus'},{model / 'chinese-alpaca-plus'}"

    road.say("A small LLaMA in Meta's format, and two Chinese LoRA adapters")
    road.run(["python", "-m", "pyalpaca.demo.make_model", "--output-dir", str(model), "--seed", str(seed)])

    road.say("Meta's format to Hugging Face's")
    convert = road.tool("convert_llama_weights_to_hf.py")
    road.run([*convert, "--input_dir", str(model / "llama"), "--model_size", "tiny", "--output_dir", str(hf)])

    road.say("Merge both adapters, in both formats; the content is the same")
    merge = [*road.tool("merge_llama_with_chinese_lora_low_mem.py"), "--base_model", str(hf), "--lora_model", lora]
    for kind, out in (("huggingface", merged), ("pth", pth)):
        road.run([*merge, "--output_type", kind, "--output_dir", str(out)])
    digests = {road.run(["pyalpaca", "digest", str(out)], capture=True).split()[0] for out in (merged, pth)}

    road.say("Cut for two tensor-parallel ranks and two pipeline stages, in Megatron's layout")
    cut = road.tool("ckpt_convert/llama/convert_weights_from_huggingface.py")
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    road.run([*cut, "--input-model-dir", str(merged), "--output-model-dir", str(megatron), *layout])

    road.say(f"Prepare {RECORDS.name}, Chinese and English instructions")
    prepare = [*road.tool("preprocess_data.py"), "--input", str(RECORDS), "--output-prefix", str(data), "--append-eod"]
    tokenizer = ["--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", str(merged), "--tokenizer-not-use-fast"]
    road.run([*prepare, *tokenizer, "--handler-name", "GeneralInstructionHandler"])

    road.say("Fine-tune: once on 4 processes from the Megatron folder, once on one from the Hugging Face folder")
    settings = (
        f"--data {data} --seq-length 128 --pad-to 16 --micro-batch-size 4 --global-batch-size 16 --steps {steps} --lr 1.5e-3"
    )
    part = ["--split", f"{_TRAINED},{100 - _TRAINED},0"]
    recipe = [*settings.split(), *part, "--warmup-steps", "10", "--min-lr", "1e-4", "--seed", str(seed), "--log-every", "10"]
    parallel, single = folder / "run-tp2-pp2", folder / "run-one-process"
    torchrun = ["torchrun", "--standalone", "--nproc_per_node"]
    split = ["--tp", "2", "--pp", "2"]
    road.run([*torchrun, "4", "-m", "pyalpaca.train", "--model", str(megatron), "--output", str(parallel), *split, *recipe])
    road.run(["python", "-m", "pyalpaca.train", "--model", str(merged), "--output", str(single), *recipe])

    road.say("Compare the two losses, step by step")
    picture = folder / "loss.png"
    report = road.run(["pyalpaca", "report", str(single), str(parallel), "--output", str(picture)], capture=True)

    road.say("Ask questions of the training set: on two processes, then on one")
    ask = ["-m", "pyalpaca.generate", "--model", str(parallel), "--template", "ascendspeed", "--max-new-tokens", "48"]
    for question in _questions():
        ask += ["--prompt", question]
    answers = {
        road.run([*torchrun, "2", *ask, "--tp", "2"], capture=True),
        road.run(["python", *ask], capture=True),
    }
    losses = [json.loads(line)["loss"] for line in (parallel / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "max_relative_error": json.loads(report.splitlines()[-1])["max_relative_error"],
        "tp_pp_text_equal": len(answers) == 1,
        "digest_equal": len(digests) == 1,
        "seconds": round(time.perf_counter() - began, 1),
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pyalpaca demo",
        description="Walk the whole road on a small model: make it, convert, merge, re-cut, prepare data, fine-tune on 4 "
        "processes and on one, compare, generate. Each step is printed as the command that a user would type.",
    )
    p.add_argument("--output", default="runs/demo", type=Path, metavar="DIR", help="folder for all files (default runs/demo)")
    p.add_argument("--seed", default=42, type=int, metavar="N", help="the same seed gives the same numbers (default 42)")
    p.add_argument("--steps", default=150, type=int, metavar="N", help="steps of fine-tuning (default 150)")
    p.add_argument(
        "--real-width", action="store_true", help="one layer of the 7B at full width and with the real vocabularies instead"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the last line is one JSON object, the exit status 1 if something in it is not as it should be."""
    args = parser().parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected at least 1")
    if args.real_width:
        from pyalpaca.demo.real_width import walk as walk_real_width

        result = walk_real_width(args.output, args.seed)
        good = result["transformers_equal"] is not False
    else:
        result = walk(args.output, args.seed, args.steps)
        error = result["max_relative_error"]
        good = bool(result["tp_pp_text_equal"] and result["digest_equal"] and isinstance(error, float) and error < 0.02)
    print()
    print(json.dumps(result))
    return 0 if good else 1
