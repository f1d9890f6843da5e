"""Triton kernels, one file a kernel; imported as ``diffad_fast.kernels``."""
