"""What goes over the wire: the generated contracts (`baton.v1`) and how channels and servers are opened (`baton.rpc`).

And what people import: `from baton import Client, AsyncClient` and the errors, loaded only when they are asked for.
Everyone may import it, clients too. It never imports torch, ray or another room of the project.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.client import AsyncClient, AsyncStream, Client, Stream
    from baton.completion import Choice, Completion, Delta, EchoedPrompt, TokenLogprob, Usage
    from baton.conversation import Retry, Sampling
    from baton.errors import BatonError, BrokenAnswer, DeadlineExceeded, InvalidRequest, NoRoom, Unavailable

__all__ = [
    "RELEASE",
    "AsyncClient",
    "AsyncStream",
    "BatonError",
    "BrokenAnswer",
    "Choice",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Delta",
    "EchoedPrompt",
    "InvalidRequest",
    "NoRoom",
    "Retry",
    "Sampling",
    "Stream",
    "TokenLogprob",
    "Unavailable",
    "Usage",
]

try:
    RELEASE = version("baton-serve")
except PackageNotFoundError:  # running from a checkout that was not installed
    RELEASE = "0.0.0+checkout"

_HOMES = {
    "client": ("AsyncClient", "AsyncStream", "Client", "Stream"),
    "completion": ("Choice", "Completion", "Delta", "EchoedPrompt", "TokenLogprob", "Usage"),
    "conversation": ("Retry", "Sampling"),
}


def __getattr__(name: str) -> Any:
    """Loads gRPC only for those who ask for a client: every process of Baton imports this package."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "errors")
    return getattr(import_module(f"{__name__}.{home}"), name)
