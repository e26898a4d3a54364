"""The plan room: memory, traffic and time of a training before it runs, from the shapes of model and layout alone."""

from pyalpaca.plan.devices import DEVICES, Device, free_memory, known_tflops, this_machine
from pyalpaca.plan.draw import draw
from pyalpaca.plan.estimate import EFFICIENCY, Plan, Stage, make_plan
from pyalpaca.plan.job import Job
from pyalpaca.plan.memory import Memory
from pyalpaca.plan.page import as_json, page, reason, search_table
from pyalpaca.plan.search import search
from pyalpaca.plan.traffic import traffic
from pyalpaca.plan.work import computed_twice, teraflops

__all__ = [
    "DEVICES",
    "EFFICIENCY",
    "Device",
    "Job",
    "Memory",
    "Plan",
    "Stage",
    "as_json",
    "computed_twice",
    "draw",
    "free_memory",
    "known_tflops",
    "make_plan",
    "page",
    "reason",
    "search",
    "search_table",
    "teraflops",
    "this_machine",
    "traffic",
]
