"""Where clients arrive: the policy that chooses where a request runs, the cluster view, and the front doors.

Pure: `policy`, `view`. Shells: `links` (streams to workers), `dispatch` (the life of a request in the router),
`text`, `generation` (text in, text out), `grpc_door`, `http_door`. Never torch.
"""
