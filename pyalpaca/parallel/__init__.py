"""The parallel room: mesh, tensor-parallel axis, pipeline schedules and their interpreter, on torch.distributed."""

from pyalpaca.parallel.axis import sequence_parameters, tensor_axis
from pyalpaca.parallel.collectives import (
    all_gather_columns,
    all_gather_sequence,
    all_reduce,
    all_reduce_buckets,
    barrier,
    broadcast,
    broadcast_object,
    gather_objects,
    reduce_scatter_sequence,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from pyalpaca.parallel.deferred import Deferred, give
from pyalpaca.parallel.host import agree, host_group, remember, remembered, tell
from pyalpaca.parallel.mesh import Mesh, close_mesh, find_device, init_mesh
from pyalpaca.parallel.pipeline import run_pipeline
from pyalpaca.parallel.ring import context_axis, context_share, ring_attention, ring_positions
from pyalpaca.parallel.schedule import (
    SCHEDULES,
    Action,
    Simulation,
    interleaved,
    one_f_one_b,
    pipeline_schedule,
    simulate,
    zb_h1,
)
from pyalpaca.parallel.traffic import Traffic, count_traffic
from pyalpaca.parallel.watch import PeerLostError, Watch

__all__ = [
    "SCHEDULES",
    "Action",
    "Deferred",
    "Mesh",
    "PeerLostError",
    "Simulation",
    "Traffic",
    "Watch",
    "agree",
    "all_gather_columns",
    "all_gather_sequence",
    "all_reduce",
    "all_reduce_buckets",
    "barrier",
    "broadcast",
    "broadcast_object",
    "close_mesh",
    "context_axis",
    "context_share",
    "count_traffic",
    "find_device",
    "gather_objects",
    "give",
    "host_group",
    "init_mesh",
    "interleaved",
    "one_f_one_b",
    "pipeline_schedule",
    "reduce_scatter_sequence",
    "remember",
    "remembered",
    "ring_attention",
    "ring_positions",
    "run_pipeline",
    "sequence_parameters",
    "simulate",
    "start_all_gather",
    "start_all_reduce",
    "start_reduce_scatter",
    "tell",
    "tensor_axis",
    "zb_h1",
]
