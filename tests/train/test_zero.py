"""Data parallelism: buckets that travel during the backward pass, and ZeRO-1, whose state any layout reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from torch import Tensor
from train_makers import MODEL, losses, records, settings, train_all
from workers import all_losses

from pyalpaca import parallel
from pyalpaca.checkpoint import digest, native_tensors, open_checkpoint
from pyalpaca.model import flatten, init, parameters, shard, whole_slice
from pyalpaca.parallel import Mesh, init_mesh
from pyalpaca.train import TrainConfig, reduction, train
from pyalpaca.train.optimizer import gradient_norm, updated, updated_place
from pyalpaca.train.reduction import collect, gather_rows, make_buckets, own_rows, row_range

CPU = torch.device("cpu")
FULL = TrainConfig(micro_batch_size=1, global_batch_size=8, lr=1e-2, steps=4, seq_length=16, clip=0.5, bucket_size=3000)
LORA = replace(FULL, lora_r=3, lora_full="lm_head")
ONE = (FULL, LORA)
LAYOUTS = {
    "dp4": replace(FULL, bucket_size=10**6),
    "dp4 small buckets": FULL,
    "dp4 zero1": replace(FULL, zero=1),
    "dp4 zero1 one bucket": replace(FULL, zero=1, bucket_size=10**6),
    "tp2 dp2 zero1": replace(FULL, zero=1, tp=2),
    "pp2 dp2 zero1": replace(FULL, zero=1, pp=2),
    "tp2 dp2 zero1 lora": replace(LORA, zero=1, tp=2),
    "pp2 dp2 zero1 lora": replace(LORA, zero=1, pp=2),
    "dp4 zero1 bf16": replace(FULL, zero=1, dtype="bf16"),
    "dp4 bf16": replace(FULL, dtype="bf16"),
}


def test_every_layout_with_zero_has_the_losses_and_norms_of_one_process() -> None:
    alone = dict(zip(ONE, all_losses(ONE, MODEL, FULL.steps), strict=True))
    found = launch(4, all_losses, list(LAYOUTS.values()), MODEL, FULL.steps)
    for rank in found:
        by_name = dict(zip(LAYOUTS, map(torch.tensor, rank), strict=True))
        for name, config in LAYOUTS.items():
            if config.dtype == "fp32":
                expected = torch.tensor(alone[LORA if config.lora_r else FULL])
                torch.testing.assert_close(by_name[name], expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(by_name["dp4 small buckets"], by_name["dp4"])
        torch.testing.assert_close(by_name["dp4 zero1 bf16"], by_name["dp4 bf16"], atol=1e-4, rtol=1e-4)
    assert alone[FULL][0][1] > FULL.clip  # the norm matters


def test_a_share_of_the_optimizer_lies_in_the_whole_where_it_says() -> None:
    """Over all ranks of any mesh the shares cover each parameter once, and hold what the rank's view of its tensor holds."""
    whole = flatten(init(parameters(MODEL), seed=1))
    config = TrainConfig(zero=1)
    for tp, dp in ((1, 3), (2, 2), (2, 40)):
        covered = {path: torch.zeros_like(t) for path, t in whole.items()}
        for rank in range(tp * dp):
            mesh = Mesh(CPU, tp=tp, dp=dp, rank=rank)
            for p in parameters(MODEL):
                local = whole_slice(whole[p.path], shard(p, mesh.tp_rank, tp))
                mine = updated({p.path: local}, mesh, config)[p.path]
                box, count = whole[p.path], covered[p.path]
                for piece in updated_place(p, mesh, config) or []:
                    box, count = whole_slice(box, piece), whole_slice(count, piece)
                assert torch.equal(mine, box)
                if p.dim is not None or mesh.tp_rank == 0:
                    count += 1
        assert all((count == 1).all() for count in covered.values())


def test_without_zero_a_rank_updates_its_tensors_themselves() -> None:
    tensors = flatten(init(parameters(MODEL), seed=1))
    for mesh, config in ((Mesh(CPU, dp=4, rank=2), TrainConfig()), (Mesh(CPU), TrainConfig(zero=1))):
        assert all(t is tensors[path] for path, t in updated(tensors, mesh, config).items())
        assert updated_place(parameters(MODEL)[0], mesh, config) is None


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_buckets_hold_every_row_once_and_begin_with_what_the_backward_pass_has_first(ranks: int) -> None:
    tensors = {f"t{i}": torch.randn(rows, 4) for i, rows in enumerate((7, 2, 30, 1))} | {"norm": torch.randn(9)}
    buckets = make_buckets(tensors, ranks, 60)
    assert [path for bucket in buckets for path in bucket.slots] == list(tensors)[::-1]
    assert len(buckets) == 3 and max(len(bucket.slots) for bucket in buckets) == 2
    for bucket in buckets:
        flat = torch.full((ranks, bucket.chunk), -1.0)
        for rank in range(ranks):
            for path, view in bucket.views(flat[rank], rank):
                assert (view == -1).all()  # no two share a place
                view.copy_(own_rows(tensors[path], rank, ranks))
        for path in bucket.slots:
            parts = [dict(bucket.views(flat[rank], rank))[path] for rank in range(ranks)]
            assert torch.equal(torch.cat(parts), tensors[path])
    assert row_range(2, 4, 5) == (1, 2) and row_range(2, 3, 5) == (1, 1)


def in_order(sharded: bool) -> list[str]:
    """What happens in two backward passes through two tensors, each in a bucket of its own."""
    mesh = init_mesh()
    seen: list[str] = []
    for name in ("start_all_reduce", "start_reduce_scatter"):
        start = getattr(parallel, name)
        setattr(reduction, name, lambda *args, start=start: seen.append("bucket") or start(*args))
    leaves = {name: torch.ones(4, 2, requires_grad=True) for name in ("first", "last")}
    for name, leaf in leaves.items():
        leaf.register_hook(lambda _, name=name: seen.append(name))
    buckets = make_buckets(leaves, 2 if sharded else 1, 8)
    finish = collect(leaves, 2, buckets, mesh.dp_rank, mesh.replica_group)
    for factor in (1.0, 2.0):
        (leaves["last"] * leaves["first"].exp() * factor * (mesh.rank + 1)).sum().backward()
    grads = finish()
    whole = torch.full((4, 2), 9 * torch.e)
    expected = own_rows(whole, mesh.rank, 2) if sharded else whole
    torch.testing.assert_close(grads, {"first": expected, "last": expected})
    if sharded and mesh.replica_group:
        weights = {name: torch.full((4, 2), float(mesh.rank)) for name in leaves}
        gather_rows(weights, buckets, mesh.rank, mesh.replica_group)
        assert all(torch.equal(w, torch.tensor([[0.0], [0.0], [1.0], [1.0]]).expand(4, 2)) for w in weights.values())
    return seen


def orders() -> list[list[str]]:
    return [in_order(sharded) for sharded in (False, True)]


def test_a_bucket_sets_out_in_the_last_pass_before_the_next_gradient_is_there() -> None:
    for seen in (seen for rank in launch(2, orders) for seen in rank):
        assert seen == ["last", "first", "last", "bucket", "first", "bucket"]


def test_the_norm_of_shares_needs_the_data_parallel_ranks() -> None:
    table = {p.path: p for p in parameters(MODEL)}
    grads: dict[str, Tensor] = {path: torch.randn(p.shape) for path, p in table.items()}
    shares = [updated(grads, Mesh(CPU, dp=3, rank=r), TrainConfig(zero=1)) for r in range(3)]
    parts = [gradient_norm(share, table, Mesh(CPU, dp=3, rank=r), zero=True) for r, share in enumerate(shares)]  # no group
    whole = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(torch.stack(parts).norm(), whole)


def optimizer_tensors(run: Path) -> dict[str, Tensor]:
    tensors = native_tensors(run, "optimizer")
    return {name: tensors.read(name, None) for name in tensors.shapes}


@pytest.mark.parametrize("kind", [{}, {"lora_r": 2, "dtype": "bf16"}], ids=["full", "lora bf16"])
def test_shared_state_is_read_by_any_layout_and_resumes_to_the_bit(road: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    usual = {"zero": 1, "global_batch_size": 8, "lr_decay_steps": 6, "bucket_size": 2000, **kind}
    never, stopped = (settings(road, tmp_path / name, steps=steps, **usual) for name, steps in (("never", 6), ("stopped", 3)))
    tensor = replace(stopped, output=str(tmp_path / "tp2"), tp=2)
    launch(4, train_all, [replace(never, save_every=3, keep=5), stopped, tensor])
    launch(4, train_all, [replace(stopped, steps=6, resume=True)])
    assert digest(open_checkpoint(tmp_path / "stopped")) == digest(open_checkpoint(tmp_path / "never"))
    resumed, straight = optimizer_tensors(tmp_path / "stopped"), optimizer_tensors(tmp_path / "never")
    assert resumed.keys() == straight.keys() and all(torch.equal(t, straight[name]) for name, t in resumed.items())
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(tmp_path / "stopped")] == [r[key] for r in records(tmp_path / "never")]
    # One process goes on from what four shared, with and without tensor parallelism.
    train(replace(tensor, tp=1, zero=0, steps=6, resume=True))
    close = 1e-5 if "dtype" not in kind else 1e-3
    assert losses(tmp_path / "tp2") == pytest.approx(losses(tmp_path / "never"), abs=close)


def test_zero_2_is_deepspeeds() -> None:
    with pytest.raises(
        ValueError, match="zero is 2, expected 0 or 1; ZeRO-2 and ZeRO-3 are DeepSpeed's, give --engine deepspeed"
    ):
        TrainConfig(zero=2)
