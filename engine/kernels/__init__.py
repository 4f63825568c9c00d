"""Triton kernels of the GPU path, each beside a torch reference with the same arguments (`..._reference`).

Imported only where the device is a GPU, by tests (Triton's interpreter runs them on a CPU), and by `ahead`, which
compiles them for GPUs that are not there. A wrapper takes tensors at fixed addresses, so that a CUDA graph may hold it,
and never reads a tensor's values on the host. Nothing here knows of requests, layers or schedulers.
"""
