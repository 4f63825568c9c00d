"""One model replica.

Bookkeeping (no torch, no I/O, no clocks): `api`, `sequence`, `prefix`, `ledger`, `scheduler`.
Tensors: `model_config`, `weights`, `model`, `kv_cache`, `attention`, `sampler`, `runner`.
Several ranks: `shards` (who holds what; no torch), `collective`, `distributed`.
"""
