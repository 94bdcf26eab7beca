"""The operations of a step, a folder each: reference (PyTorch), kernel (Triton), cpu (C++), op (autograd)."""

# transformers 5.0-5.2 imports any module called `kernels` that it can see and refuses one without a version.
__version__ = "0.0.0"
