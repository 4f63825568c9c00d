"""Load on a live server, open loop, and what it says of it: `baton bench`.

    traces, synthetic -> prompts -> load -> targets (OpenAI HTTP, Baton gRPC) -> figures -> report

Everything that computes (traces, synthetic, prompts, figures) is pure; `load` and `targets` do the I/O. It measures
any OpenAI-compatible server and knows nothing of Baton's inside: of this project it imports only `baton`, the client.
"""
