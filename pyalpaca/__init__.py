"""pyalpaca: LLaMA and Chinese-LLaMA-Alpaca on Ascend NPUs and on any CPU: convert, merge, fine-tune, compare, generate.

The rooms are imported by name (`from pyalpaca.model import forward`); importing the package itself loads nothing heavy,
so that `pyalpaca --help` answers at once.
"""

__version__ = "0.1.0"
