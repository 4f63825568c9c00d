"""Tries a transport between two processes of this machine: `python -m kvtransfer.trial KIND` prints a `Trial` as JSON.

For `baton doctor`. Both ends are processes of their own, so that a transport which crashes or hangs its process is a
finding, and not the end of who asked.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import msgspec
import numpy as np
import xxhash

from kvtransfer import preflight
from kvtransfer.messages import Measured
from kvtransfer.preflight import AREA_BYTES, Preflight
from kvtransfer.transport import Region, TransportError
from kvtransfer.transports import Endpoint, open_transport

LIMIT_S = 60.0  # for both processes to start, which on a busy machine takes most of it
_RECEIVE = "--receive"


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """`error` empty: it works, and the bytes that landed were those that were sent."""

    kind: str
    name: str = ""
    devices: str = ""
    measured: Measured = Measured()
    warnings: tuple[str, ...] = ()
    error: str = ""


def trial(kind: str, limit_s: float = LIMIT_S) -> Trial:
    """Never raises and never hangs: what goes wrong is the trial's error."""
    try:
        sender = subprocess.run(
            [sys.executable, "-m", "kvtransfer.trial", kind],
            check=False,
            capture_output=True,
            timeout=limit_s,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
    except subprocess.TimeoutExpired:
        return Trial(kind=kind, error=f"nothing came back within {limit_s:g} s")
    except OSError as error:
        return Trial(kind=kind, error=f"its process could not be started: {error}")
    said = sender.stderr.decode(errors="replace").strip().splitlines()
    if sender.returncode < 0:
        name = signal.Signals(-sender.returncode).name
        return Trial(kind=kind, error=f"its process was ended by {name}{': ' + said[-1] if said else ''}")
    try:
        found = msgspec.json.decode(sender.stdout, type=Trial)
    except msgspec.DecodeError:
        return Trial(
            kind=kind, error=f"exit status {sender.returncode}: {said[-1] if said else 'no message'}"
        )
    slow = tuple(line for line in said if line.startswith("SLOW TRANSPORT"))
    return msgspec.structs.replace(found, warnings=slow)


def send(kind: str) -> Trial:
    """The sending process: starts the receiving one and measures."""
    try:
        endpoint = open_transport(kind, AREA_BYTES, 0, "trial-sender")
    except TransportError as error:
        return Trial(kind=kind, error=str(error))
    receiver = subprocess.Popen(
        [sys.executable, "-m", "kvtransfer.trial", _RECEIVE, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert receiver.stdin is not None and receiver.stdout is not None
        description = bytes.fromhex(receiver.stdout.readline().decode())
        if not description:
            return Trial(kind=kind, name=endpoint.name, error="the receiving process ended; see above")
        endpoint.connect("receiver", description)
        measured = preflight.run(endpoint, "receiver", Preflight())
        wrong = measured.error or _checked(endpoint, receiver)
        return Trial(kind=kind, name=endpoint.name, devices=endpoint.devices, measured=measured, error=wrong)
    except TransportError as error:
        return Trial(kind=kind, name=endpoint.name, error=str(error))
    finally:
        receiver.kill()
        receiver.communicate()


def _checked(endpoint: Endpoint, receiver: subprocess.Popen[bytes]) -> str:
    """Whether bytes arrive as they were sent; else what is wrong."""
    assert receiver.stdin is not None and receiver.stdout is not None
    endpoint.staging[:] = np.random.default_rng(0).integers(0, 256, AREA_BYTES, np.uint8)
    ticket = endpoint.write("receiver", np.array([[0, 0, AREA_BYTES]], dtype=np.uint64))
    end = time.monotonic() + preflight.LIMIT_S
    errors: list[str] = []
    while not errors:
        if time.monotonic() > end:
            return "a write has not settled in time"
        errors = [settled.error for settled in endpoint.poll() if settled.ticket == ticket]
    if errors[0]:
        return errors[0]
    receiver.stdin.write(b"sum\n")
    receiver.stdin.flush()
    if receiver.stdout.readline().decode().strip() != _sum(endpoint.staging):
        return "the bytes that landed are not those that were sent"
    return ""


def _sum(region: Region) -> str:
    return xxhash.xxh3_128_hexdigest(region.data)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def receive(kind: str) -> None:
    """The receiving process: lands what comes, until its standard input ends."""
    endpoint = open_transport(kind, 0, AREA_BYTES, "trial-receiver")
    _say(endpoint.describe().hex())
    while True:
        endpoint.poll()
        if select.select([sys.stdin], [], [], 0.0002)[0]:
            if not sys.stdin.readline():
                return
            _say(_sum(endpoint.landing))


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if sys.argv[1] == _RECEIVE:
        receive(sys.argv[2])
    else:
        _say(msgspec.json.encode(send(sys.argv[1])).decode())
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(0)  # some libraries are known to crash in exit handlers on some machines


if __name__ == "__main__":
    main()
