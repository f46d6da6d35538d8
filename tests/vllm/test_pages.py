"""Pages are tested when they are registered: what does not come back as it was is refused."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from lmkv_ray import layout
from lmkv_ray.errors import UnsupportedError
from lmkv_ray.layout import ChunkLayout, PageView, Run
from tests.vllm.test_worker import worker

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("lost", [16, 0])
def test_a_layout_that_is_not_what_its_strides_say_is_refused(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def derive(views: Sequence[PageView], *, num_blocks: int, blocks: int) -> ChunkLayout:
        *runs, last = layout.derive_layout(views, num_blocks=num_blocks, blocks=blocks).runs
        wrong = Run(last.offset, last.stride, last.nbytes - lost)
        return ChunkLayout((*runs, wrong), blocks, num_blocks)

    monkeypatch.setattr("lmkv_ray.vllm.worker.pages.derive_layout", derive)
    if not lost:
        worker(0)[0].shutdown()
        return
    before = set(threading.enumerate())  # an engine of another test may still be ending
    with pytest.raises(UnsupportedError, match="did not survive"):
        worker(0)
    made = set(threading.enumerate()) - before
    assert not [thread.name for thread in made if thread.name.startswith("lmkv-")]
