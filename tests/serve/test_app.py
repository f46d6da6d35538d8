"""Two real replicas behind HTTP: what one has read, the other and its successors need not read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from serve_apps import replicas
from serve_apps.client import RequestError, ask
from serve_apps.documents import Library
from serve_apps.llm import build_app
from serve_apps.measure import (
    APP,
    MODEL,
    START_SECONDS,
    all_saved,
    app_args,
    free_port,
    local_ray,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # Ray's and vLLM's own
]

TOKENS, CACHED = 1048, 1024


@pytest.fixture(scope="module")
def port(smollm2: Path) -> Iterator[int]:
    with local_ray():
        number = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": number})
        serve.run(build_app(app_args(smollm2, cache=True)), name=APP, route_prefix="/")
        yield number


def test_replicas_share_what_they_read(port: int, smollm2: Path) -> None:
    messages = Library(smollm2).document(TOKENS).messages
    a, b = replicas.wait(APP, 2, START_SECONDS)

    cold = ask(port, MODEL, messages, replica=a, max_tokens=16)
    assert (cold.prompt_tokens, cold.cached_tokens) == (TOKENS, 0)
    floor = ask(port, MODEL, messages, replica=a, max_tokens=16)
    assert floor.cached_tokens == CACHED
    all_saved()
    other = ask(port, MODEL, messages, replica=b, max_tokens=16)
    assert (other.cached_tokens, other.text) == (CACHED, floor.text)

    replicas.kill(APP)
    c, d = replicas.wait(APP, 2, START_SECONDS, gone={a, b})
    for replica in (c, d):
        restarted = ask(port, MODEL, messages, replica=replica, max_tokens=16)
        assert (restarted.cached_tokens, restarted.text) == (CACHED, floor.text)


def test_the_servers_refusal_is_told(port: int) -> None:
    with pytest.raises(RequestError, match="404"):
        ask(port, "no-such-model", [{"role": "user", "content": "x"}], replica="", max_tokens=1)
