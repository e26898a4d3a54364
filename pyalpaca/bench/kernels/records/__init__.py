"""The records: every operator that `pyalpaca bench kernels` measures, in the order of the table."""

from pyalpaca.bench.kernels.operator import Operator
from pyalpaca.bench.kernels.records import attention, linear, lora, norms, rope

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        norms.RMS_NORM,
        rope.ROPE,
        linear.LINEAR,
        attention.FLASH_ATTENTION,
        lora.LORA_MERGE,
    )
}

__all__ = ["OPERATORS"]
