"""Writing that leaves the old result or the new one, whatever happens, and room on the disk: the front door."""

from pyalpaca.files.atomic import PARTIAL, atomic_file, atomic_folder
from pyalpaca.files.replace import MARKERS
from pyalpaca.files.space import free_space, human_size, require_space
from pyalpaca.files.system import preallocate, sync

__all__ = [
    "MARKERS",
    "PARTIAL",
    "atomic_file",
    "atomic_folder",
    "free_space",
    "human_size",
    "preallocate",
    "require_space",
    "sync",
]
