"""Triton kernels of the transfer; they equal their torch twins bit for bit. Imported only where a pool is on a GPU."""
