import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmkv_ray.vllm.fingerprint import weights_fingerprint


def tensors(change: str | None = None) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    made = {f"layer.{i}.weight": generator.normal(size=(64, 64)).astype("f4") for i in range(8)}
    if change:
        made[change] += 1e-3
    return made


def test_the_same_weights_have_the_same_fingerprint_wherever_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(tensors(), tmp_path / name / "model.safetensors")
    assert weights_fingerprint(str(tmp_path / "a")) == weights_fingerprint(str(tmp_path / "b"))


@pytest.mark.parametrize("changed", sorted(tensors()))
def test_a_fine_tune_of_one_tensor_is_seen(changed: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    before = weights_fingerprint(str(tmp_path))
    save_file(tensors(changed), file)
    assert weights_fingerprint(str(tmp_path)) != before


def test_other_weight_files_are_sampled(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    content = bytearray(1 << 20)
    file.write_bytes(content)
    before = weights_fingerprint(str(file))
    content[512 * 1024] = 1
    file.write_bytes(content)
    assert weights_fingerprint(str(file)) != before


def test_weights_that_are_not_here_are_told_apart_by_name_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert weights_fingerprint("nobody/a") != weights_fingerprint("nobody/b")
        assert weights_fingerprint("nobody/a", "1") != weights_fingerprint("nobody/a", "2")
    assert "not on this machine" in caplog.text
