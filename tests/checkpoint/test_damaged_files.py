"""Whatever happens to a file on its way, opening it ends with one sentence or with the right weights, never in a crash."""

from __future__ import annotations

import json
import random

import pytest
from checkpoint_makers import make_adapter, make_hf, model

from pyalpaca.checkpoint import digest, open_checkpoint, write_megatron, write_meta, write_native


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    make_hf(root / "hf")
    make_hf(root / "bin", weights="bin", max_shard_size="60KB")
    write_meta(model(), root / "meta", num_shards=2)
    write_megatron(model(), root / "megatron", tp=2)
    write_native(model(), root / "native")
    make_adapter(root / "adapter")
    return root


def cut(data, choose):
    return data[: choose.randrange(len(data))]


def flip(data, choose):
    """Bytes of the head or the tail changed: that is where headers and tables are."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 3, 20])):
        place = choose.randrange(min(len(data), 1500))
        changed[place if choose.random() < 0.7 else -1 - place] = choose.randrange(256)
    return bytes(changed)


def reword(data, choose):
    """A field of a JSON file changed to a value of another kind."""
    try:
        fields = json.loads(data)
    except ValueError:
        return cut(data, choose)
    fields[choose.choice(list(fields))] = choose.choice([None, 0, -1, "x", [], {}, 1.5, True, 10**9])
    return json.dumps(fields).encode()


@pytest.mark.parametrize("damage", [cut, flip, reword])
@pytest.mark.parametrize("layout", ["hf", "bin", "meta", "megatron", "native", "adapter"])
def test_damage_is_an_error_or_harmless(layouts, layout, damage):
    choose = random.Random(f"{layout} {damage.__name__}")
    folder = layouts / layout
    files = sorted(f for f in folder.rglob("*") if f.is_file() and (damage is not reword or f.suffix == ".json"))
    for _ in range(25):
        file = choose.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damage(whole, choose))
        try:
            digest(open_checkpoint(layouts / "hf", lora=[folder]) if layout == "adapter" else open_checkpoint(folder))
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
        finally:
            file.write_bytes(whole)
