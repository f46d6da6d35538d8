"""Ask a question over the OpenAI HTTP API and time the first token."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve_apps.pinned_router import REPLICA_HEADER


class RequestError(RuntimeError):
    """The server refused or broke off; the message holds its own words."""


@dataclass(frozen=True)
class Answer:
    """One reply.

    ttft_s: seconds from the request to the first piece of text.
    cached_tokens: of prompt_tokens, those that were not computed; 0 if the engine does not say.
    """

    text: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


def ask(
    port: int,
    model: str,
    messages: Sequence[dict[str, str]],
    *,
    replica: str,
    max_tokens: int,
    timeout_s: float = 120,
) -> Answer:
    """The greedy answer of `replica`, streamed. RequestError, or OSError, when there is none."""
    body = json.dumps(
        {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    headers = {"Content-Type": "application/json", REPLICA_HEADER: replica}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(f"HTTP {response.status}: {response.read(2000).decode()}")
        text, first, usage = "", None, None
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestError(str(event["error"]))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if content := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    text += content
    finally:
        connection.close()
    if first is None or usage is None:
        raise RequestError(f"the stream ended without text or usage: {text!r}")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        text=text,
        ttft_s=first - start,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
    )
