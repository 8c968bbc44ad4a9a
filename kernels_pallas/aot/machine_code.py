"""What the machine code of a Hopper kernel says of its speed, without a GPU.

ptxas assembles the PTX that Mosaic compiles a kernel to; it says how many registers a thread takes and how many bytes
are spilled. nvdisasm lists the instructions, each with the cycles that its warp waits before it issues the next one
(bits 41 to 44 of the upper half of its code). Of the loops that multiply matrices:

    tensor    cycles of the tensor cores: a wgmma of 64 x n x 16 takes n / 2
    stalls    the waits of all instructions, in which the other warpgroup may multiply
    share     of the time in which the tensor cores are busy, at most: with w warpgroups in turns w tensor / (tensor +
              stalls), and tensor / (what the busiest other pipe takes)

Waiting for memory and for the products themselves is not in it. Published times of kernels of five kinds on an H100 are
0.7 x 989 TFLOP/s x share (fitted to them), so that shares compare kernels and predict no times.
"""

import ctypes
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

# Cycles that a warp's instruction takes its pipe, of which each of an SM's four partitions has one.
_PIPES = {
    "special": (8, {"MUFU"}),
    "integer": (2, {"FMNMX", "LOP3", "IADD3", "ISETP", "FSETP", "SEL", "FSEL", "PRMT", "SHF", "VIADD", "LEA", "PLOP3"}),
    "convert": (2, {"F2FP", "I2F", "F2I", "IMNMX", "VIMNMX"}),
    "float": (1, {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"}),
    "multiply": (2, {"IMAD"}),
    "memory": (4, {"LDS", "STS", "SHFL", "LDSM", "STSM", "LD", "ST", "LDG", "STG", "ATOMS", "LDL", "STL"}),
}
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L_x_\d+):")


class Loop(NamedTuple):
    """A loop's body. share: of its time in which the tensor cores are busy, at most."""

    instructions: int
    products: int
    tensor: int
    stalls: int
    share: float


class Code(NamedTuple):
    """registers: per thread. spilled: bytes written to local memory. loops: those that multiply matrices, innermost."""

    registers: int
    spilled: int
    instructions: int
    loops: tuple[Loop, ...]
    said: str


class _Instruction(NamedTuple):
    address: int
    stall: int
    name: str
    operands: str


def tool(name: str) -> str:
    """Path of ptxas or nvdisasm: of NVIDIA's wheels, else of the PATH.

    Raises:
      FileNotFoundError: neither has it.
    """
    wheels = Path(sysconfig.get_path("purelib"), "nvidia").glob(f"*/bin/{name}")
    found = next((str(path) for path in wheels), None) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not here; install the extra gpu-aot")
    return found


def assemble(ptx: str, *, linked: bool = False, warpgroups: int = 2) -> Code:
    """A kernel's PTX compiled for sm_90a by ptxas, as jax 0.10 and 0.11 do, or linked: by nvJitLink, as jax 0.12 does
    where it is. warpgroups: of a block.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        if linked:
            said = _link(ptx, cubin)
        else:
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx)
            command = [tool("ptxas"), "-v", "-arch=sm_90a", str(source), "-o", str(cubin)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [tool("nvdisasm"), "-c", "-hex", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, labels = _parse(listing)
    loops = tuple(_measure(code[first : last + 1], warpgroups) for first, last in _loops(code, labels))
    spilled = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise ValueError(f"the compiler names no registers: {said[:200]}")
    return Code(int(registers[1]), int(spilled[1]) if spilled else 0, len(code), loops, said)


def _link(ptx: str, cubin: Path) -> str:
    """Has nvJitLink compile PTX into a file; what it says."""
    libraries = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/lib/libnvJitLink.so.13")
    path = next((str(library) for library in libraries), "libnvJitLink.so.13")
    library = ctypes.CDLL(path)
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(library, f"__nvJitLink{name}_13_0")(*arguments)
        if status:
            raise OSError(f"nvJitLink{name} gives {status}")

    def read(name: str) -> bytes:
        call(f"Get{name}Size", handle, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        call(f"Get{name}", handle, data)
        return data.raw

    options = (ctypes.c_char_p * 2)(b"-arch=sm_90a", b"-verbose")
    call("Create", ctypes.byref(handle), ctypes.c_uint32(len(options)), options)
    try:
        source = ptx.encode() + b"\0"
        call("AddData", handle, ctypes.c_int(2), source, ctypes.c_size_t(len(source)), b"kernel.ptx")  # 2: PTX
        call("Complete", handle)
        cubin.write_bytes(read("LinkedCubin"))
        return read("InfoLog").rstrip(b"\0").decode()
    finally:
        library.__nvJitLinkDestroy_13_0(ctypes.byref(handle))


def _parse(listing: str) -> tuple[list[_Instruction], dict[str, int]]:
    """(instructions, the index of the first one after each label)."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if (label := _LABEL.match(line)) is not None:
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.match(line)) is not None:
            code.append(_Instruction(int(found[1], 16), 0, found[2], found[3]))
        elif code and (upper := _UPPER_HALF.match(line)) is not None:
            code[-1] = code[-1]._replace(stall=int(upper[1], 16) >> 41 & 15)
    return code, labels


def _loops(code: list[_Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) of the innermost loops with a product; a wait that tries again is none."""
    found = set()
    for index, each in enumerate(code):
        target = re.search(r"\.L_x_\d+", each.operands) if each.name.startswith("BRA") else None
        waits = any(before.name.startswith("SYNCS.PHASECHK") for before in code[max(0, index - 3) : index])
        if target is not None and not waits and labels.get(target[0], index + 1) <= index:
            found.add((labels[target[0]], index))
    multiply = [
        (first, last) for first, last in found if any(x.name.startswith("HGMMA") for x in code[first : last + 1])
    ]
    return sorted(
        loop
        for loop in multiply
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in multiply)
    )


def _measure(body: list[_Instruction], warpgroups: int) -> Loop:
    names = Counter(each.name.partition(".")[0] for each in body)
    shapes = [re.match(r"HGMMA\.\d+x(\d+)x\d+", each.name) for each in body]
    tensor = sum(int(shape[1]) // 2 for shape in shapes if shape is not None)
    stalls = sum(each.stall for each in body)
    pipes = [cycles * sum(names[name] for name in members) for cycles, members in _PIPES.values()]
    busiest = max(*pipes, len(body))
    share = min(1.0, warpgroups * tensor / (tensor + stalls), tensor / busiest)
    return Loop(len(body), names["HGMMA"], tensor, stalls, share)
