"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

The package is installed as `corrmatch.kernels`. This version has no Triton kernel yet: `corrmatch.backends()` says so,
and tensors on a GPU are served by the "reference" backend.
"""
