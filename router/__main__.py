"""`python -m router`: one router process; see `router.spec` for how it is told what to do."""

from router.server import main

main()
