"""Builds `cpu.cpp` for the processor at hand, once, and loads it."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from selfalign.disk import cache_folder, write_whole
from selfalign.errors import UserError

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"),
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had.

    They need Linux, an x86 processor with AVX2 or AVX-512 and g++, whose OpenMP shares its threads
    with torch's. Compiling takes about two seconds; the result is kept in the cache
    folder, under a name that depends on source, flags, compiler and processor.
    """
    compiler = shutil.which("g++")
    vectors = torch.backends.cpu.get_cpu_capability()
    if not sys.platform.startswith("linux") or not compiler or vectors not in ("AVX2", "AVX512"):
        return None
    try:
        path = cache_folder("kernels") / f"cpu-{_fingerprint(compiler)}.so"
        if not path.exists():
            write_whole(path, functools.partial(_compile, compiler))
        return ctypes.CDLL(str(path))
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"the CPU kernels are not used, training is slower: {output.strip().splitlines()[0]}",
            stacklevel=2,
        )
        return None


def _compile(compiler: str, path: Path) -> None:
    command = [compiler, *FLAGS, "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    information = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in information if line.startswith(("model name", "flags"))}
    parts = (
        SOURCE.read_bytes(),
        " ".join(FLAGS).encode(),
        version,
        repr(sorted(processor)).encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
