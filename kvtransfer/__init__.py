"""Moving KV between replicas.

Pure: `messages` (what two workers say), `handshake` (whether they can), `chunks` (how a hand-off is cut up), `leases`
(who may write where), `digest`, `preflight` (how fast a peer is). Shells: `layout` (pool <-> wire layout), `transport`
and its kinds, `devices` (what moves bytes here), `trial` (a transport tried out), `mover` (the thread that owns a
transport), `links` (the gRPC control streams) and `wire` (their protobuf). It imports engine bookkeeping only.
"""
