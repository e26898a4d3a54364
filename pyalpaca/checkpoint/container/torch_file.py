"""Stand-in until the reader is there: to be overwritten."""
from pyalpaca.checkpoint.pth import open_tensors, open_torch

__all__=["open_tensors","open_torch"]
