"""Two vLLM replicas on a Ray of their own, asked about documents, new and already read."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
from ray import serve
from rich.progress import Progress

from lmkv_ray.actors import connect
from lmkv_ray.config import load_settings
from serve_apps import leftovers, replicas, report, saved
from serve_apps.client import Answer, ask
from serve_apps.documents import Document, Library
from serve_apps.llm import AppArgs, build_app
from serve_apps.model import smollm2

# Each is whole blocks of 32 tokens and 24 more: a prompt's last token is always computed, so with
# whole blocks only vLLM's own cache and ours would end their hits at different tokens.
LENGTHS = (1048, 2072, 4120, 7192)
COPIES = 3
COLD_SECONDS = 150  # no further copy of the documents when it would not fit into this
ANSWER_TOKENS = 16
APP, MODEL = "demo", "smollm2"
START_SECONDS = 300
# vLLM's own cache of a replica: room for the longest prompt, and little more. So a document that
# is read again after all the others has long left it, as it has on a busy server.
ENGINE_BLOCKS = 320

# A namespace of its own, so that nobody who uses a cache of this machine stops this one.
CACHE = {"capacity": "2GiB", "ray_namespace": "lmkv-demo"}

logger = logging.getLogger("demo")


class Demo:
    """Asks the replicas in turn, and keeps what they answered."""

    def __init__(self, port: int, progress: Progress, saved: Callable[[], None] | None) -> None:
        """saved: returns when all computed so far is in the cache. None: there is no cache."""
        self._port = port
        self._saved = saved
        self._progress = progress
        self._bar = progress.add_task("")
        self._answers: dict[tuple[str, Document], Answer] = {}

    def run(self, start: Callable[[], object], library: Library) -> None:
        """All cases for all documents. start: brings the app up."""
        self._start("starting two replicas", 1)
        start()
        a, b = replicas.wait(APP, 2, START_SECONDS)
        long, short = library.document(max(LENGTHS)), library.document(min(LENGTHS))
        self._start("warming up", 5)
        # Each replica computes once and finds once what the other has computed.
        for replica, document in ((a, long), (b, short)):
            self._ask(replica, document)
        if self._saved is not None:
            self._saved()
        for replica, document in ((a, long), (a, short), (b, long)):
            self._ask(replica, document)

        documents = self._read_cold(library, a)
        if self._saved is None:
            return
        self._saved()
        self._case("same_replica", a, documents)
        self._case("other_replica", b, documents)

        self._start("killing and restarting both replicas", 1)
        replicas.kill(APP)
        c, _ = replicas.wait(APP, 2, START_SECONDS, gone={a, b})
        for document in (short, long):
            self._ask(c, document)
        self._case("after_restart", c, documents)

    def rows(self) -> list[report.Row]:
        """What was measured, by length and case."""
        rows = []
        for length in LENGTHS:
            for case in report.CASES:
                found = {
                    document: answer
                    for (asked, document), answer in self._answers.items()
                    if (asked, document.tokens) == (case, length)
                }
                if found:
                    rows.append(
                        report.Row(
                            prompt_tokens=length,
                            case=case,
                            ttft_s=[round(answer.ttft_s, 4) for answer in found.values()],
                            text_equal=all(
                                answer.text == self._answers["prefix_cache", document].text
                                for document, answer in found.items()
                            ),
                        )
                    )
        return rows

    def _read_cold(self, library: Library, replica: str) -> list[Document]:
        """New documents, each asked for twice: computed, then found in the replica's own cache."""
        documents: list[Document] = []
        start = time.monotonic()
        self._start("reading documents", 2 * COPIES * len(LENGTHS))
        for copy in range(COPIES):
            spent = time.monotonic() - start
            # Two at least: a single one might still be in vLLM's own cache afterwards.
            if copy >= 2 and spent / copy * (copy + 1) > COLD_SECONDS:
                break
            for document in library.documents(LENGTHS, 1):
                for case in ("cold", "prefix_cache"):
                    self._answers[case, document] = self._ask(replica, document)
                documents.append(document)
        return documents

    def _case(self, case: str, replica: str, documents: list[Document]) -> None:
        self._start(f"asking again: {report.CASES[case]}", len(documents))
        for document in documents:
            self._answers[case, document] = self._ask(replica, document)

    def _ask(self, replica: str, document: Document) -> Answer:
        answer = ask(
            self._port, MODEL, document.messages, replica=replica, max_tokens=ANSWER_TOKENS
        )
        if answer.prompt_tokens != document.tokens:
            raise RuntimeError(
                f"{document.name} has {document.tokens} tokens, but the engine counts "
                f"{answer.prompt_tokens}: the model's chat template is not SmolLM2's"
            )
        logger.info(
            "%s %d tokens, %d cached, %.4f s %r",
            replica,
            answer.prompt_tokens,
            answer.cached_tokens,
            answer.ttft_s,
            answer.text,
        )
        self._progress.advance(self._bar)
        return answer

    def _start(self, what: str, steps: int) -> None:
        logger.info(what)
        self._progress.reset(self._bar, description=what, total=steps)


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own for as long as the context lasts; nothing stays but its logs in /tmp/ray."""
    before = leftovers.files()
    try:
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            object_store_memory=256 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            namespace="lmkv",
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray has set its own
        yield
    finally:
        # Ray reports the end of its actors as failures, on standard output.
        with _uninterrupted(), contextlib.redirect_stdout(sys.stderr):
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    serve.shutdown()  # type: ignore[no-untyped-call]
                ray.shutdown()
            leftovers.sweep(before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C pressed again must not stop the cleaning half-way."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def measure(progress: Progress, cache: bool) -> list[report.Row]:
    """Start everything, ask, and end everything again. cache: False measures vLLM alone."""
    model = smollm2()
    with local_ray():
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = build_app(app_args(model, cache))
        demo = Demo(port, progress, all_saved if cache else None)
        demo.run(lambda: serve.run(app, name=APP, route_prefix="/"), Library(model))
        return demo.rows()


def all_saved() -> None:
    """Wait until the replicas have saved all they computed."""
    saved.wait(connect(settings=load_settings(CACHE), start=False))


def app_args(model: Path, cache: bool) -> AppArgs:
    """The demo's app: what `make demo` serves."""
    return AppArgs(
        model=str(model),
        model_id=MODEL,
        num_replicas=2,
        max_model_len=8192,
        accelerator="cpu",
        # Requests come one at a time, so each may have the whole machine.
        cpu_threads=min(8, os.cpu_count() or 1),
        cache=CACHE if cache else False,
        engine_kwargs={
            "num_gpu_blocks_override": ENGINE_BLOCKS,
            "max_num_seqs": 4,
            "enable_prompt_tokens_details": True,  # answers say how many tokens were cached
        },
        deployment={
            "health_check_period_s": 1,  # so that a killed replica is noticed soon
            "request_router_config": {
                "request_router_class": "serve_apps.pinned_router:PinnedRouter"
            },
        },
    )


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
