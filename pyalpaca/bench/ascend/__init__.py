"""What the kernels for NPUs would take, modelled: their instructions played against published rates (docs/ascend.md)."""
