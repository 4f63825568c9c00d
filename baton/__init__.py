"""What goes over the wire: the generated contracts (`baton.v1`) and how channels and servers are opened (`baton.rpc`).

And what people import: `from baton import Client, AsyncClient` and the errors, loaded only when they are asked for.
Everyone may import it, clients too. It never imports torch, ray or another room of the project.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.client import AsyncClient, AsyncStream, Client, Stream
    from baton.conversation import Completion, Delta, Retry, Sampling, Usage
    from baton.errors import BatonError, BrokenAnswer, DeadlineExceeded, InvalidRequest, NoRoom, Unavailable

__all__ = [
    "RELEASE",
    "AsyncClient",
    "AsyncStream",
    "BatonError",
    "BrokenAnswer",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "InvalidRequest",
    "NoRoom",
    "Retry",
    "Sampling",
    "Stream",
    "Unavailable",
    "Usage",
]

try:
    RELEASE = version("baton-serve")
except PackageNotFoundError:  # running from a checkout that was not installed
    RELEASE = "0.0.0+checkout"

_CLIENT = ("AsyncClient", "AsyncStream", "Client", "Stream")
_CONVERSATION = ("Completion", "Delta", "Retry", "Sampling", "Usage")


def __getattr__(name: str) -> Any:
    """Loads gRPC only for those who ask for a client: every process of Baton imports this package."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "client" if name in _CLIENT else "conversation" if name in _CONVERSATION else "errors"
    return getattr(import_module(f"{__name__}.{module}"), name)
