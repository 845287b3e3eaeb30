"""The demo in PyTorch and in JAX. Its task is to tell which submodule of SciPy a sentence comes from."""
