"""What is read from a GPU kernel's machine code; where the extra gpu-aot is, of one that is compiled for an H100."""

import importlib.util
import subprocess
import sys

import pytest

from kernels_pallas.aot import machine_code
from kernels_pallas.aot.gpu_table import ATOMIC

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the extra gpu-aot, which is 1.3 GB",
)


def instruction(address, text, stall):
    """Two lines of nvdisasm: the lower half of the code beside the text, then the upper half with the stall."""
    return f"        /*{address:04x}*/                   {text} ;\n             /* 0x{stall << 41:016x} */"


LISTING = "\n".join(
    [
        instruction(0, "MOV R1, c[0x0][0x28]", 1),
        ".L_x_1:",
        instruction(16, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", 2),
        instruction(32, "MUFU.EX2 R4, R4", 3),
        instruction(48, "FFMA R5, R4, R4, R4", 10),
        instruction(64, "@!P0 BRA `(.L_x_1)", 5),
        ".L_x_2:",  # a wait that tries again
        instruction(80, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", 1),
        instruction(96, "@!P0 BRA `(.L_x_2)", 1),
        ".L_x_3:",  # a loop without products
        instruction(112, "FADD R5, R4, R4", 4),
        instruction(128, "@!P0 BRA `(.L_x_3)", 5),
    ]
)


def test_loops_that_multiply_are_found_and_counted():
    code, labels = machine_code._parse(LISTING)
    assert [each.name for each in code][:3] == ["MOV", "HGMMA.64x128x16.F32.BF16", "MUFU.EX2"]
    assert [each.stall for each in code][:4] == [1, 2, 3, 10]
    [(first, last)] = machine_code._loops(code, labels)
    assert machine_code._measure(code[first : last + 1], 2) == (4, 1, 64, 20, 1.0)
    assert machine_code._measure(code[first : last + 1], 1).share == 64 / 84


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("\t@%p1 atom.global.add.f32 %f1, [%rd1], %f2;", ["atom.global.add.f32"]),
        ("\tred.async.relaxed.cluster.global.add.u32 [%rd1], %r1;", ["red.async.relaxed.cluster.global.add.u32"]),
        (
            "\tcp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%rd1, {%r1, %r2}], [%r3];",
            ["cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group"],
        ),
        ("\tcp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, %r2}], [%r3];", []),
        ("\tmbarrier.arrive.shared.b64 %rd2, [%r1];", []),
    ],
)
def test_sums_without_an_order_are_found(line, found):
    assert ATOMIC.findall(f".entry kernel()\n{line}\n") == found


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(machine_code.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine_code.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(FileNotFoundError, match="ptxas is not here; install the extra gpu-aot"):
        machine_code.tool("ptxas")


@needs_plugin
@pytest.mark.slow
def test_the_table_has_registers_and_no_spills():
    command = [sys.executable, "-m", "kernels_pallas.aot", "--gpu", "h100", "--kernel", "banded flash"]
    done = subprocess.run([*command, "--shape", "small model 2k"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [row] = done.stdout.splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["banded flash", "small model 2k", "h100", "banded_flash_attention"]
    assert cells[6] == "0 / 0"
