"""A virtual cluster in one process: the real roles under virtual time, seeded chance and every kind of fault.

`world` has the clock and the event heap, `node` runs one role as a worker does, `mover` and `network` stand in for the
transport and the control streams, `model` for the model, `client` for a router, `faults` breaks things, `invariants`
watches, `run` puts it together. `soak` runs it on and on (`scripts/soak`).
"""
