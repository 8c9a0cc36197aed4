"""Kernels on a GPU: csrc/gpu, compiled at run time, behind the same five functions."""
