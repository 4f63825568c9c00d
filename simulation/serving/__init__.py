"""A serving cluster under virtual time: how quickly a deployment would answer a trace, and under which policy.

`profiles` says what steps and hand-offs cost, `agenda` has the clock, `names` the prefixes of a trace, `worker` the
step loop, `decode_worker` and `prefill_side` the two kinds of it over the real role, scheduler and ledger, `landing`
the hand-offs between them, `front` the router with the real policy, view and prefix index. `cluster` puts them
together, `results` and `report` say what came of it, `plan` searches for the best split. Pure but for `report`. The
modules beside this folder look for broken invariants instead.
"""
