"""What the two roles share: the step loop of a rank process, the ring to its shell, the shell's gRPC side.

`prefill` and `decode` plug a role (a pure state machine) into it. It never decides anything about requests or KV,
and never imports ray.
"""
