"""The limits of this machine, from probe.c: what the kernels' speeds are shares of."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

READ_BYTES = 256 << 20  # more than any last-level cache that matters here
FMA_ROUNDS = 400_000


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("error: the probe needs a C compiler: install one or set CC")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "probe.so"
        source = Path(__file__).with_name("probe.c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, "-o", str(built), str(source)], check=True)
        library = ctypes.CDLL(str(built))
    for function in (library.probe_read_gbs, library.probe_fma_gflops):
        function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
        function.restype = ctypes.c_double
    library.probe_scattered_gbs.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
    ]
    library.probe_scattered_gbs.restype = ctypes.c_double
    return library


def measure(threads: int, repeats: int = 5) -> dict[str, float]:
    """read_gbs: GB/s of a plain read loop; fma_gflops: GFLOP/s of a plain fp32 FMA loop; both the
    best of `repeats`."""
    library = _library()
    return {
        "read_gbs": library.probe_read_gbs(threads, READ_BYTES, repeats),
        "fma_gflops": library.probe_fma_gflops(threads, FMA_ROUNDS, repeats),
    }


def scattered_share(threads: int, piece: int, rounds: int = 20) -> float:
    """What pieces of so many bytes, read in random order with eight multiply-adds a vector, get of
    the plain read loop; the median of rounds in which the two take turns."""
    library = _library()
    shares = []
    for _ in range(rounds):
        read = library.probe_read_gbs(threads, READ_BYTES, 1)
        shares.append(library.probe_scattered_gbs(threads, READ_BYTES, piece, 1) / read)
    return sorted(shares)[rounds // 2]


if __name__ == "__main__":
    threads = len(os.sched_getaffinity(0))
    print(measure(threads))
    for piece in (2 << 10, 4 << 10, 12 << 10, 48 << 10, 1 << 20):
        print(f"pieces of {piece >> 10:>4} KiB: {scattered_share(threads, piece):.0%}")
