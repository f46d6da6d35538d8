"""Engines whose models differ in anything that decides the KV are told apart, by content."""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmkv_ray.config import load_settings
from lmkv_ray.identity import DigestMemory, FileDigests, StoppedError
from lmkv_ray.vllm.identity import content as module
from lmkv_ray.vllm.identity.content import Content, ContentThread, began_to_load, read_content
from tests.identity.test_changes import tick

LATER = 60.0
SECONDS = 10


def model(path: str | Path, **fields: Any) -> Any:
    defaults = {
        "model": str(path),
        "revision": None,
        "dtype": "bfloat16",
        "quantization": None,
        "seed": 0,
        "hf_config": SimpleNamespace(to_dict=dict),
    }
    return SimpleNamespace(**(defaults | fields))


def config(of_model: Any, load_format: str = "auto", **fields: Any) -> Any:
    load = SimpleNamespace(load_format=load_format, download_dir=fields.pop("download_dir", None))
    return SimpleNamespace(model_config=of_model, load_config=load, **fields)


def read(of: Any, weights_id: str | None = None, began: float | None = None) -> Content:
    began = time.time() + LATER if began is None else began
    return read_content(of, weights_id=weights_id, digests=FileDigests(None), began=began)


def checkpoint(directory: Path, change: tuple[Any, ...] | None = None, suffix: str = "") -> Path:
    """An embedding, attention heads and stacked experts; a part of one may be another."""
    generator = np.random.default_rng(0)
    tensors = {
        "embed": generator.normal(size=(1024, 64)).astype("f4"),
        "q_proj": generator.normal(size=(8, 16, 64)).astype("f4"),
        "experts": generator.normal(size=(8, 64, 64)).astype("f4"),
    }
    if change:
        tensors[change[0]][change[1]] += 1e-3
    directory.mkdir(exist_ok=True)
    if suffix:
        (directory / f"model{suffix}").write_bytes(b"".join(t.tobytes() for t in tensors.values()))
    else:
        save_file(tensors, directory / "model.safetensors")
    return directory


CHANGES: list[tuple[Any, ...]] = [
    ("embed", slice(700, 708)),
    ("q_proj", 5),
    ("experts", 3),
    ("embed", (1000, 63)),
]


@pytest.mark.parametrize("suffix", ["", ".bin", ".pt"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_part_of_a_tensor_is_seen(
    change: tuple[Any, ...], suffix: str, tmp_path: Path
) -> None:
    one = checkpoint(tmp_path / "a", suffix=suffix)
    same = checkpoint(tmp_path / "b", suffix=suffix)
    other = checkpoint(tmp_path / "c", change, suffix)
    first, second, third = (read(config(model(path))) for path in (one, same, other))
    assert first == second
    assert first.weights != third.weights
    assert first.weights.startswith("read ")


def test_weights_in_the_download_directory_are_read(tmp_path: Path) -> None:
    found = []
    for name, change in (("a", None), ("b", CHANGES[0])):
        repository = tmp_path / name / "models--some--model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        (repository / "snapshots").mkdir()
        checkpoint(repository / "snapshots" / "c0ffee", change)
        found.append(read(config(model("some/model"), download_dir=str(tmp_path / name))).weights)
    assert found[0] != found[1]
    assert all(weights.startswith("read ") for weights in found)


def test_weights_that_are_no_files_here_are_shared_only_by_an_explicit_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    streamed = [
        config(model("nobody/a")),
        config(model(checkpoint(tmp_path / "m")), "tensorizer"),
        config(model(tmp_path / "m", model_weights="s3://bucket/m")),
    ]
    for each in streamed:
        with caplog.at_level(logging.WARNING):
            assert read(each).weights != read(each).weights
        assert "Set weights_id" in caplog.text
        caplog.clear()
        assert read(each, "v1").weights == read(each, "v1").weights
        assert read(each, "v1").weights != read(each, "v2").weights
        assert not caplog.text
    names = {read(each, "v1").weights for each in streamed[:2]}
    assert len(names) == 2, "other models with one weights_id"


def test_an_explicit_name_does_not_replace_reading(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", CHANGES[0])
    assert read(config(model(one)), "v1").weights != read(config(model(other)), "v1").weights


def test_files_that_changed_since_they_began_to_be_loaded_are_not_what_the_engine_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(tmp_path / "a")
    loaded = (path / "model.safetensors").stat().st_mtime
    loaded = max(item.stat().st_ctime for item in (path, *path.iterdir())) + LATER
    assert read(config(model(path)), began=loaded).weights.startswith("read ")
    os.utime(path / "model.safetensors", (loaded + 1, loaded + 1))
    assert read(config(model(path)), began=loaded + 0.5).weights.startswith("own ")
    assert "changed after" in caplog.text


def test_a_link_that_was_moved_to_an_older_model_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a new model is put in place: no file of it is new."""
    checkpoint(tmp_path / "v1"), checkpoint(tmp_path / "v2", CHANGES[0])
    current = tmp_path / "current"
    current.symlink_to("v1")
    began = current.lstat().st_ctime
    assert read(config(model(current)), began=began).weights.startswith("read ")
    tick(tmp_path, began)
    current.unlink()
    current.symlink_to("v2")
    assert read(config(model(current)), began=began).weights.startswith("own ")
    assert f"{current} changed after" in caplog.text


def test_a_branch_that_was_moved_to_another_commit_is_seen(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    for commit, change in (("c0ffee", None), ("decade", CHANGES[0])):
        (repository / "snapshots" / commit).mkdir(parents=True)
        checkpoint(repository / "snapshots" / commit, change)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("decade")
    found = {}
    for commit in ("c0ffee", "decade"):
        read_of = SimpleNamespace(to_dict=dict, _commit_hash=commit)
        named = model("some/model", hf_config=read_of, trust_remote_code=True)
        found[commit] = read(config(named, download_dir=str(tmp_path))).weights
    assert found["c0ffee"].startswith("own ")
    assert found["decade"].startswith("read ")


def test_what_vllm_has_fetched_for_this_engine_is_believed(tmp_path: Path) -> None:
    """All of it is newer than the engine's process."""
    made = checkpoint(tmp_path / "made") / "model.safetensors"
    name = sha256(made.read_bytes()).hexdigest()
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    made.rename(repository / "blobs" / name)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    named = config(model("some/model"), download_dir=str(tmp_path))
    assert read(named, began=0.0).weights.startswith("read ")


def test_an_engines_own_process_began_before_it_loaded() -> None:
    before = time.time()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        began, now = pool.submit(_began_and_now).result(SECONDS * 6)
    assert before - 1 < began < now, "when the process was made"
    assert began_to_load() >= now, "here, where files may be made by the one who makes the engine"


def _began_and_now() -> tuple[float, float]:
    return began_to_load(), time.time()


def test_dummy_weights_are_told_apart_by_their_seed() -> None:
    found = {read(config(model("m", seed=seed), "dummy")).weights for seed in (0, 1)}
    assert found == {"dummy 0", "dummy 1"}


@pytest.mark.parametrize(
    "file", ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
)
def test_another_processor_is_seen_if_the_model_has_one(file: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a")
    seen = config(model(path, multimodal_config=SimpleNamespace()))
    before, of_text = read(seen), read(config(model(path)))
    (path / file).write_text('{"image_mean": [0.5]}')
    one = read(seen)
    (path / file).write_text('{"image_mean": [0.4]}')
    other = read(seen)
    assert len({before.processor, one.processor, other.processor}) == 3
    assert read(config(model(path))) == of_text


def test_code_that_comes_with_a_model_is_seen_if_it_is_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a")
    trusted, plain = config(model(path, trust_remote_code=True)), config(model(path))
    codes = []
    for text in ("x = 1", "x = 2"):
        (path / "modeling_mine.py").write_text(text)
        codes.append(read(trusted).code)
        assert read(plain).code == ""
    assert codes[0] != codes[1]


def test_another_version_of_the_library_is_seen_if_its_code_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "a")
    (path / "modeling_mine.py").write_text("import transformers")
    seeing = config(model(path, multimodal_config=SimpleNamespace()))
    trusted = config(model(path, trust_remote_code=True))
    borrowed = config(model(path, using_transformers_backend=lambda: True))
    found = []
    for number in ("5.0", "5.1"):
        monkeypatch.setattr(module, "version", lambda _, number=number: number)
        found.append([read(each) for each in (seeing, trusted, borrowed, config(model(path)))])
    for one, other in zip(*(item[:3] for item in found), strict=True):
        assert (one.code, one.processor) != (other.code, other.processor)
    assert found[0][3] == found[1][3], "vLLM's own code of a model of text needs none of it"


def test_a_name_of_modelscope_is_not_the_model_of_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    path = checkpoint(repository / "snapshots" / "c0ffee")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    named = config(model("some/model"), download_dir=str(tmp_path))
    assert read(named).weights.startswith("own ")
    assert read(config(model(path))).weights.startswith("read "), "a directory is what it is"


def test_code_of_another_model_that_is_not_here_is_not_guessed(tmp_path: Path) -> None:
    fields = {"auto_map": {"AutoModel": "nobody/code--modeling.Model"}}
    borrowed = model(
        checkpoint(tmp_path / "a"),
        trust_remote_code=True,
        hf_config=SimpleNamespace(to_dict=lambda: fields),
    )
    assert read(config(borrowed)).code.startswith("own ")


def test_the_draft_model_is_seen_if_its_kv_is_stored(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a")
    drafts = [checkpoint(tmp_path / "d"), checkpoint(tmp_path / "e", CHANGES[0])]

    def draft_of(method: str, draft: Path) -> str:
        speculation = SimpleNamespace(method=method, draft_model_config=model(draft))
        return read(config(model(path), speculative_config=speculation)).draft

    assert draft_of("eagle", drafts[0]) != draft_of("eagle", drafts[1])
    assert draft_of("eagle", drafts[0]) == draft_of("eagle", drafts[0]) != ""
    assert draft_of("ngram", drafts[0]) == ""
    assert read(config(model(path), speculative_config=None)).draft == ""


class Learnt:
    """What is learnt on the thread."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.there = threading.Event()

    def __call__(self, **fields: str) -> None:
        self.fields = fields
        self.there.set()


def test_an_engine_does_not_wait_for_its_weights_to_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, read_on = threading.Event(), threading.Event()

    def slow(self: FileDigests, files: list[Path]) -> list[str]:
        held.set()
        assert read_on.wait(SECONDS)
        return ["digest"] * len(files)

    monkeypatch.setattr(FileDigests, "of", slow)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0)
    thread, learnt = ContentThread(config(model(checkpoint(tmp_path))), load_settings()), Learnt()
    thread.begin(learnt)
    assert held.wait(SECONDS)
    assert not learnt.fields
    read_on.set()
    assert learnt.there.wait(SECONDS)
    assert set(learnt.fields) == set(module.CONTENT)
    assert learnt.fields["weights"].startswith("read ")
    thread.stop()


def test_what_an_earlier_engine_has_read_is_known_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lmkv_ray.identity.digests.SETTLED_SECONDS", -LATER)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", SECONDS)
    path = checkpoint(tmp_path / "m")
    for bytes_read in ((path / "model.safetensors").stat().st_size, 0):
        thread, learnt = ContentThread(config(model(path)), load_settings()), Learnt()
        thread.begin(learnt)
        assert learnt.fields["weights"].startswith("read ")
        assert thread._digests.bytes_read == bytes_read
        thread.stop()
    assert list((tmp_path / "cache" / "lmkv_ray" / "digests").iterdir())


def test_an_engine_that_ends_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path)
    pieces = threading.Event()

    def endless(self: FileDigests, fd: int) -> str:
        pieces.set()
        assert self._stopping.wait(SECONDS)
        raise StoppedError

    monkeypatch.setattr(FileDigests, "_read", endless)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(DigestMemory, "recall", lambda *_: None)
    thread, learnt = ContentThread(config(model(path)), load_settings()), Learnt()
    thread.begin(learnt)
    assert pieces.wait(SECONDS)
    thread.stop()
    assert thread._thread is not None
    assert not thread._thread.is_alive()
    assert not learnt.fields


def test_trouble_with_reading_costs_the_cache_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Content:
        raise RuntimeError("nobody has thought of this")

    monkeypatch.setattr(module, "read_content", broken)
    thread, learnt = ContentThread(config(model(tmp_path)), load_settings()), Learnt()
    thread.begin(learnt)
    assert learnt.there.wait(SECONDS)
    assert learnt.fields["weights"].startswith("own ")
    thread.stop()
