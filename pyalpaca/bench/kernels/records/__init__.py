"""The records: every operator that `pyalpaca bench kernels` measures, in the order of the table."""

from pyalpaca.bench.kernels.operator import Operator
from pyalpaca.bench.kernels.records import adamw, attention, decode, linear, lora, loss, norms, packed, quantized, rope, swiglu

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        norms.RMS_NORM,
        norms.ADD_RMS_NORM,
        rope.ROPE,
        rope.ROPE_QK,
        rope.ROPE_QK_STORE,
        swiglu.SWIGLU,
        linear.LINEAR,
        quantized.LINEAR_QUANTIZED,
        attention.FLASH_ATTENTION,
        packed.FLASH_ATTENTION_PACKED,
        decode.CACHED_ATTENTION,
        loss.LINEAR_CROSS_ENTROPY,
        adamw.ADAMW,
        adamw.GRAD_NORM,
        lora.LORA_MERGE,
    )
}

__all__ = ["OPERATORS"]
