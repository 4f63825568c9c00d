"""Moving KV between replicas.

Pure: `messages` (what two workers say), `handshake` (whether they can), `plan` (which rank sends which heads to whom),
`chunks` (how a hand-off is cut up), `leases` (who may write where), `digest`, `direct` (rows from the pool), `join`
(one report of all ranks), `preflight` (how fast a peer is). Shells: `layout`, `transcode`, `kernels` (pool <-> wire),
`memory` (what is registered), `transport` and its kinds, `devices` (what moves bytes here), `trial` (a transport tried
out), `mover` (the thread that owns a transport; with `peers`, `sending`, `receiving`), `links` (the gRPC control
streams) and `wire` (their protobuf). It imports engine bookkeeping only, and `engine.kernels.launch`.
"""
