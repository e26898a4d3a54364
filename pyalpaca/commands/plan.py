"""`pyalpaca plan`: does a training fit, what does it move, how long does a step take: before any device is asked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyalpaca.model import LlamaConfig
    from pyalpaca.plan import Device

_EPILOG = """\
examples:
  pyalpaca plan --model 13b --tp 4 --pp 2 --micro-batch 2 --global-batch 16 --seq 2048 --recompute full --device ascend910b2
  pyalpaca plan --model alpaca-plus-7b --dp 8 --zero 1 --lora-r 8 --seq 512 --global-batch 64 --output memory.png
  pyalpaca plan --model 33b --devices 16 --global-batch 128 --seq 2048 --search
  pyalpaca plan --model 13b --config examples/alpaca/finetune_tp4_pp2.toml

A step is predicted from one figure, the share of the device's limits (arithmetic, memory, links) that a run reaches. Its
default meets the published steps of the 13B on 8 Ascend 910B2 and on 8 A100 within 5 %; give --efficiency what your runs show.
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pyalpaca plan",
        description="Memory per device and part, bytes moved, bubble, step time and utilisation of a training,\n"
        "from the shapes of model and layout alone. Status 0 if it fits, 1 if not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", required=True, metavar="M", help="7b, 13b, 33b, 65b; a model folder of any layout; a config.json")
    p.add_argument("--config", metavar="TOML", help="settings of a training, instead of flags; flags given beside it win")
    p.add_argument("--vocab-size", type=int, metavar="V", help="vocabulary (default: the folder's; of a size, 49954)")
    layout = p.add_argument_group("layout")
    layout.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default 1)")
    layout.add_argument("--cp", type=int, default=1, metavar="N", help="context-parallel size (default 1)")
    layout.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default 1)")
    layout.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel size (default 1)")
    layout.add_argument("--devices", type=int, metavar="N", help="how many there are, for --search (default tp x cp x pp x dp)")
    layout.add_argument("--sequence-parallel", action="store_true", help="cut the residual stream between tp ranks")
    layout.add_argument("--schedule", choices=("1f1b", "interleaved", "zb-h1"), default="1f1b", help="of the pipeline")
    layout.add_argument("--chunks", type=int, default=1, metavar="N", help="virtual stages a stage, for interleaved")
    layout.add_argument("--layers", default="", metavar="N,N,..", help="layers of each stage (default: even)")
    layout.add_argument(
        "--zero",
        type=int,
        default=0,
        metavar="N",
        help="0; 1: the optimizer is shared; 2, 3: DeepSpeed's, gradients and weights too",
    )
    step = p.add_argument_group("step")
    step.add_argument("--micro-batch", type=int, default=1, metavar="N", help="samples in one forward pass (default 1)")
    step.add_argument("--global-batch", type=int, metavar="N", help="samples in one step (default dp x micro batch)")
    step.add_argument("--seq", type=int, default=2048, metavar="N", help="tokens of a sample (default 2048)")
    step.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of weights and activations")
    step.add_argument(
        "--recompute",
        choices=("none", "selective", "full"),
        default="full",
        help="activations that the backward pass computes again (default full, as in the published recipes)",
    )
    step.add_argument("--recompute-every", type=int, default=1, metavar="N", help="only in every N-th layer (default 1)")
    step.add_argument("--lora-r", type=int, default=0, metavar="R", help="train LoRA factors of this rank (0: all weights)")
    step.add_argument(
        "--lora-targets", default=",".join(_TARGETS), metavar="A,B", help="projections that get them (default: all)"
    )
    step.add_argument("--lora-full", default="embed_tokens,lm_head", metavar="A,B", help="modules trained in full beside LoRA")
    device = p.add_argument_group("device")
    device.add_argument(
        "--device", default="ascend910b2", metavar="D", help=f"{', '.join(_DEVICES)}, or cpu: this machine (default ascend910b2)"
    )
    device.add_argument("--memory", type=float, metavar="GB", help="of a device, instead of the known one")
    device.add_argument("--peak-tflops", type=float, metavar="X", help="of a device, instead of the known ones")
    device.add_argument("--efficiency", type=float, metavar="X", help="share of the device's limits that a run reaches")
    p.add_argument("--search", action="store_true", help="list the fastest layouts of these devices that fit")
    p.add_argument("--top", type=int, default=10, metavar="N", help="how many --search lists (default 10)")
    p.add_argument("--output", metavar="PNG", help="draw the memory of each stage by part")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of tables: bytes, seconds, shares")
    return p


_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DEVICES = ("ascend910b1", "ascend910b2", "ascend910b3", "ascend910b4", "a100-40gb", "a100")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raises ValueError or OSError for bad input."""
    args = _parse(argv)
    from pyalpaca.plan import EFFICIENCY, Job, as_json, draw, make_plan, page, search, search_table

    if args.devices is not None and not args.search:
        raise ValueError(f"--devices {args.devices} is for --search; give --tp, --pp and --dp, or --search")
    model = _model(args.model, args.vocab_size)
    devices = args.devices if args.devices is not None else args.tp * args.cp * args.pp * args.dp
    if devices < 1:
        raise ValueError(f"{devices} devices were asked for, expected at least 1; check --devices, --tp, --cp, --pp and --dp")
    efficiency = EFFICIENCY if args.efficiency is None else args.efficiency
    device = _device(args, devices)
    shape = {"dp": devices} if args.search else {"tp": args.tp, "cp": args.cp, "pp": args.pp, "dp": args.dp}
    job = Job(
        model,
        **shape,
        micro_batch=1 if args.search else args.micro_batch,
        global_batch=args.global_batch or shape["dp"] * (1 if args.search else args.micro_batch),
        seq=args.seq,
        dtype=args.dtype,
        recompute="none" if args.search else args.recompute,
        recompute_every=1 if args.search else args.recompute_every,
        zero=0 if args.search else args.zero,
        lora_r=args.lora_r,
        lora_targets=_words(args.lora_targets),
        lora_full=_words(args.lora_full),
        schedule=args.schedule,
        chunks=args.chunks,
        layers=_counts(args.layers),
        sequence_parallel=args.sequence_parallel,
    )
    if args.search:
        found = search(job, device, efficiency)[: args.top]
        if args.json:
            print(json.dumps({"plans": [as_json(plan, args.model) for plan in found]}))
        else:
            print(search_table(found) if found else f"no layout of {devices} x {device.name} fits; take more devices, or LoRA")
        return 0 if found else 1
    plan = make_plan(job, device, efficiency)
    if args.output:
        draw(plan, args.model, Path(args.output))
    if args.json:
        print(json.dumps(as_json(plan, args.model)))
    else:
        print(page(plan, args.model))
        if args.output:
            print(f"picture: {args.output}")
    return 0 if plan.fits else 1


# What a training calls a setting, where the planner's name is another.
_NAMES = {
    **{"micro_batch_size": "micro_batch", "global_batch_size": "global_batch", "seq_length": "seq", "virtual_stages": "chunks"},
    "layers_per_stage": "layers",
}

_PLANNED = (
    *("tp", "cp", "pp", "sequence_parallel", "schedule", "chunks", "layers", "zero", "micro_batch", "global_batch", "seq"),
    *("dtype", "recompute", "recompute_every", "lora_r", "lora_targets", "lora_full"),
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; with --config a training's settings, and its defaults where the file is silent, stand in for flags."""
    known = parser()
    args = known.parse_args(argv)
    if not args.config:
        return args
    import dataclasses

    from pyalpaca.train import TrainConfig, read_toml

    settings = dataclasses.asdict(TrainConfig(**read_toml(args.config)))
    named = {_NAMES.get(name, name): value for name, value in settings.items()}
    known.set_defaults(**{name: named[name] for name in _PLANNED})
    return known.parse_args(argv)


def _model(name: str, vocab_size: int | None) -> LlamaConfig:
    """The shape of a model: a published size, a config.json, or a folder."""
    from dataclasses import replace

    from pyalpaca.checkpoint import SIZES, open_checkpoint, size_by_name
    from pyalpaca.model import LlamaConfig, config_from_hf

    path, size = Path(name), size_by_name(name)
    if size is not None and not path.exists():
        heads = size.num_heads
        shape = (size.hidden_size, size.intermediate_size, size.num_layers, heads, heads, size.hidden_size // heads)
        return LlamaConfig(vocab_size or 49954, *shape, norm_eps=size.norm_eps)
    if not path.exists():
        raise FileNotFoundError(f"{name}: not found, expected {', '.join(SIZES)}, a model folder or a config.json; check --model")
    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file}: is not JSON ({error}), expected a Hugging Face config.json; give another --model"
            ) from None
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: holds {type(fields).__name__}, expected an object; give a Hugging Face config.json")
        config = config_from_hf(fields)
    else:
        config = open_checkpoint(path, vocab_size=vocab_size).config
    return replace(config, vocab_size=vocab_size) if vocab_size else config


def _device(args: argparse.Namespace, devices: int) -> Device:
    from dataclasses import replace

    from pyalpaca.plan import DEVICES, this_machine

    if args.device == "cpu":
        found = this_machine(devices)
    elif args.device in DEVICES:
        found = DEVICES[args.device]
    else:
        from difflib import get_close_matches

        near = get_close_matches(args.device, [*DEVICES, "cpu"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(DEVICES)}, cpu"
        raise ValueError(f"there is no device {args.device!r}: {hint}")
    given: dict[str, Any] = {}
    for key, value, unit in (("memory", args.memory, 1e9), ("tflops", args.peak_tflops, 1.0)):
        if value is not None:
            if not value > 0:
                raise ValueError(f"--{'peak-tflops' if key == 'tflops' else key} is {value}, expected a positive number")
            given[key] = value * unit
    return replace(found, **given)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _counts(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"--layers is {text!r}, expected numbers with commas between them, one a stage") from None
