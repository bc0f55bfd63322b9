"""Builds `kernels.cpp` for the processor at hand, once, and loads it."""

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

COMPILER = "g++"
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"),
)


@functools.cache
def lacking() -> str | None:
    """What this machine lacks for the kernels, or None.

    They need Linux, an x86 processor with AVX2 or AVX-512, and g++, whose OpenMP shares its threads
    with torch's.
    """
    if not sys.platform.startswith("linux"):
        return f"they are for Linux, this is {sys.platform}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "they are for x86 processors with AVX2 or AVX-512"
    if shutil.which(COMPILER) is None:
        return f"they are compiled at first use, and there is no {COMPILER}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Compiling takes about two seconds; the result is kept in the cache folder, under a name that depends
    on source, flags, compiler and processor.

    Raises:
        UserError: they cannot be had here, and why.
    """
    reason = lacking()
    if reason is not None:
        raise UserError(reason)
    try:
        path = cache_folder("kernels") / f"cpu-{_fingerprint()}.so"
        if not path.exists():
            write_whole(path, _compile)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        raise UserError(output.strip().splitlines()[0]) from error


def available() -> bool:
    """Whether there are compiled kernels here."""
    return _try_once()


torch.compiler.assume_constant_result(available)  # the compiler need not look for g++


@functools.cache
def _try_once() -> bool:
    """Whether the kernels can be had; a build that failed is one warning."""
    if lacking() is not None:
        return False
    try:
        library()
    except UserError as error:
        warnings.warn(f"the CPU kernels are not used, training is slower: {error}", stacklevel=3)
        return False
    return True


def _compile(path: Path) -> None:
    command = [COMPILER, *FLAGS, "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _fingerprint() -> str:
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    information = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in information if line.startswith(("model name", "flags"))}
    parts = (
        SOURCE.read_bytes(),
        " ".join(FLAGS).encode(),
        version,
        repr(sorted(processor)).encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
