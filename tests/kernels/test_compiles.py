"""pages.cu becomes machine code for the GPUs of today, without a GPU, and no register spills."""

import re
from typing import NamedTuple

import pytest
from cupy_backends.cuda.libs import nvrtc

from lmkv_ray.kernels import pages

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
ADDED_BY_CUPY = ("-ftz=true", "--device-as-default-execution-space")
KERNELS = {f"{name}_{word}" for name in ("gather", "scatter") for word in (1, 2, 4, 8, 16)}


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    registers: int
    stack: int
    spilled: int


def compile_for(architecture: str, source: str) -> dict[str, Usage]:
    """Machine code by NVRTC; resources of each kernel."""
    program = nvrtc.createProgram(source, "pages.cu", (), ())
    try:
        options = (*pages.OPTIONS, *ADDED_BY_CUPY, f"-arch={architecture}")
        nvrtc.compileProgram(program, (*options, "--ptxas-options=-v"))
        assert nvrtc.getCUBIN(program)[:4] == b"\x7fELF"
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    usage = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.findall(r"^'(\w+)'", part)[0]
        [(stack, stores, loads)] = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        [registers] = re.findall(r"Used (\d+) registers", part)
        usage[name] = Usage(int(registers), int(stack), int(stores) + int(loads))
    return usage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(architecture: str) -> None:
    usage = compile_for(architecture, pages.source())
    assert set(usage) == KERNELS
    for name, (registers, stack, spilled) in usage.items():
        assert (stack, spilled) == (0, 0), name
        assert registers * pages.THREADS * 4 <= 65536, name  # four thread blocks do fit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_spill_would_be_seen(architecture: str) -> None:
    crowded = pages.source().replace("(THREADS, 4)", "(THREADS, 8)")  # 32 registers a thread
    assert crowded != pages.source()
    assert any(usage.spilled for usage in compile_for(architecture, crowded).values())


def test_an_error_would_be_seen() -> None:
    with pytest.raises(nvrtc.NVRTCError):
        compile_for("sm_90", pages.source() + "error")


def test_constants_are_those_of_the_source() -> None:
    defined = dict(re.findall(r"^#define (\w+) (\d+)$", pages.source(), re.MULTILINE))
    assert {name: int(value) for name, value in defined.items()} == {
        "THREADS": pages.THREADS,
        "LANES": pages.LANES,
        "UNROLL": pages.UNROLL,
    }
