"""The demo in PyTorch and in JAX, and its task: tell from which submodule of SciPy a sentence comes."""
