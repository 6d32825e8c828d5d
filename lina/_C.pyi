"""The compiled module. Importing it registers torch.ops.lina.*."""

CUDA: bool
"""Whether the GPU kernels were built."""
