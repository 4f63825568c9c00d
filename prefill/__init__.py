"""The prefill role: computes the KV of prompts that decode workers ask for and pushes it into their landing slots.

`role` is pure; `rank` and `shell` run it. It imports engine, kvtransfer and worker. It never samples.
"""
