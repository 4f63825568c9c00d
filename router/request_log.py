"""One line in the log for each request that is over, for people or (`router.log_format: json`) for machines.

Set up once by `router.server`; a line is made when a request ends, never while its tokens flow. What a client sent
reaches the log only as its request id and in the words of a refusal, and can start no line of its own.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from engine.api import Trace
from router.account import Account

LogFormat = Literal["text", "json"]

log = logging.getLogger("baton.requests")

_MAX_ID_CHARS = 128


def log_request(account: Account) -> None:
    """Writes the line."""
    log.info(RequestLine(account))


class RequestLine:
    """The message of a log record: words for people, fields for the JSON formatter."""

    def __init__(self, account: Account) -> None:
        self.account = account

    def __str__(self) -> str:
        account = self.account
        parts = [
            f"request {_plain(account.request_id)[:_MAX_ID_CHARS] or '(no id)'}: {account.outcome}",
            f"{account.prompt_tokens} + {account.generated_tokens} tokens",
            f"{account.ended - account.arrived:.3f} s",
        ]
        if account.first_token is not None:
            parts.append(f"TTFT {account.first_token - account.arrived:.3f} s")
        if account.decision is not None:
            parts.append(f"on {account.decision.decode_worker}, {account.decision.reason}")
        trace = account.trace
        if trace is not None:
            parts.append(
                f"{trace.cached_tokens} cached, {trace.remote_tokens} handed off in {trace.handoff_s:.3f} s"
            )
            if trace.fallback:
                parts.append(f"fell back: {trace.fallback}")
        if account.detail:
            parts.append(_plain(account.detail))
        return "; ".join(parts)

    def fields(self) -> dict[str, Any]:
        """Times in seconds. What is not known (a refused request has no worker) is null."""
        account = self.account
        decision, trace = account.decision, account.trace or Trace()
        known = account.trace is not None

        def told(value: Any) -> Any:
            return value if known else None

        return {
            "request_id": account.request_id[:_MAX_ID_CHARS],
            "outcome": account.outcome,
            "detail": account.detail,
            "decision": None if decision is None else decision.reason,
            "decode_worker": None if decision is None else decision.decode_worker,
            "prefill_worker": None if decision is None else decision.prefill_worker,
            "prefilled": told(trace.prefilled),
            "fallback": told(trace.fallback),
            "prompt_tokens": account.prompt_tokens,
            "cached_tokens": told(trace.cached_tokens),
            "remote_tokens": told(trace.remote_tokens),
            "generated_tokens": account.generated_tokens,
            "handoff_bytes": told(trace.handoff_bytes),
            "e2e_s": round(account.ended - account.arrived, 6),
            "ttft_s": None
            if account.first_token is None
            else round(account.first_token - account.arrived, 6),
            "queue_s": told(round(trace.queue_s, 6)),
            "handoff_s": told(round(trace.handoff_s, 6)),
            "prefill_s": told(round(trace.prefill_s, 6)),
            "decode_s": told(round(trace.decode_s, 6)),
        }


class JsonFormatter(logging.Formatter):
    """Every record as one line of JSON: time, level, logger, router, then the message or a request's fields."""

    def __init__(self, router_id: str) -> None:
        super().__init__()
        self._router_id = router_id

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "router": self._router_id,
        }
        if isinstance(record.msg, RequestLine):
            line.update(event="request", **record.msg.fields())
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up_logging(router_id: str, log_format: LogFormat) -> None:
    """All of this process's logging, to standard error. Call it once."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter(router_id))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {router_id} %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _plain(text: str) -> str:
    """Nothing in it can end the line or move the cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
