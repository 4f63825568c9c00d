"""`python -m decode`: a decode worker without Ray; see `worker.spec` for how it is told what to do."""

from decode.shell import DecodeShell
from worker.shell import run

run(DecodeShell)
