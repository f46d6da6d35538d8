"""pages.cu is HIP as well: clang, which hipRTC is made of, compiles it for AMD's GPUs.

Clang comes with zig. What this leaves unproven is hipRTC itself: its own headers and options.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmkv_ray.kernels import pages
from tests.kernels.backends import HERE
from tests.kernels.test_compiles import KERNELS

pytest.importorskip("ziglang", reason="ziglang, which brings clang, is not installed")

ARCHITECTURES = ["gfx90a", "gfx942", "gfx950"]  # MI200, MI300, MI350


def compile_for(architecture: str, source: Path, assembly: Path) -> dict[str, dict[str, int]]:
    """Resources of each kernel, from the metadata of the assembly."""
    command = [sys.executable, "-m", "ziglang", "clang", "-x", "hip", "--cuda-device-only"]
    command += [f"--offload-arch={architecture}", "-nogpulib", "-nogpuinc", "-fms-extensions"]
    command += [*pages.OPTIONS, "-O3", "-include", str(HERE / "hip.h")]
    subprocess.run([*command, "-S", str(source), "-o", str(assembly)], check=True, timeout=120)
    metadata = assembly.read_text().split("amdhsa.kernels:")[1]
    return {
        re.findall(r"\.name: +((?:gather|scatter)_\d+)", kernel)[0]: {
            name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)", kernel)
        }
        for kernel in metadata.split("- .agpr_count")[1:]
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    source, assembly = tmp_path / "pages.hip", tmp_path / "pages.s"
    source.write_text(pages.source())
    kernels = compile_for(architecture, source, assembly)
    assert set(kernels) == KERNELS
    for name, usage in kernels.items():
        assert not usage["vgpr_spill_count"] + usage["private_segment_fixed_size"], name
        assert not usage["sgpr_spill_count"], name
    wide = [assembly.read_text().count(f"global_{what}_dwordx4") for what in ("load", "store")]
    assert min(wide) >= 2 * pages.UNROLL  # gather_16 and scatter_16 really move 16 bytes


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "pages.hip"
    few = "__attribute__((amdgpu_num_vgpr(16)))"
    crowded = pages.source().replace("(THREADS, 4)", f"(THREADS) {few}")
    assert crowded != pages.source()
    source.write_text(crowded)
    kernels = compile_for("gfx942", source, tmp_path / "pages.s")
    assert any(usage["vgpr_spill_count"] for usage in kernels.values())
