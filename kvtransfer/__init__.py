"""Moving KV between replicas.

Pure: `messages` (what two workers say), `chunks` (how a hand-off is cut up), `leases` (who may write where), `digest`.
Shells: `layout` (pool <-> wire layout), `transport` and its kinds, `mover` (the thread that owns a transport),
`control` (the gRPC control stream). It imports engine bookkeeping only.
"""
