"""The decode role: takes requests, fetches their KV from a prefill worker or prefills itself, decodes.

`role` and `handoff` are pure; `rank` and `shell` run them. It imports engine, kvtransfer and worker.
"""
