"""`python -m prefill`: a prefill worker without Ray; see `worker.spec` for how it is told what to do."""

from prefill.shell import PrefillShell
from worker.shell import run

run(PrefillShell)
