"""Seconds to check a model's folder by its checksums, with one thread, beside reading it alone.

    python benchmarks/checksums.py [--gb 2] [--repeats 5] [--folder /tmp]

Writes a folder of two files of random bytes; reads it, and checks it. Cold: the kernel is told to
forget the files before; warm: it has them in memory, as it then has for the loading of the model.
Prints medians, and the slowest and fastest.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from spin import checksums

BLOCK = 2**20


def forget(paths):
    """Drop the files from the kernel's memory, once they are on the disk."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path):
    """Read a file and do nothing with it."""
    with open(path, "rb", buffering=0) as file:
        block = bytearray(BLOCK)
        while file.readinto(block):
            pass


def cell(work, paths, how: str, repeats: int) -> str:
    """How long it takes for all files, one after another: the median, the slowest, the fastest."""
    times = []
    for _ in range(repeats):
        checksums._sha256.cache_clear()
        if how == "cold":
            forget(paths)
        begun = time.perf_counter()
        for path in paths:
            work(path)
        times.append(time.perf_counter() - begun)
    return f"{statistics.median(times):.1f} s ({max(times):.1f}, {min(times):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where the files go (default: /tmp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = [Path(folder) / name for name in ("a", "b")]
        for path in paths:
            with open(path, "wb") as file:
                for _ in range(int(args.gb * 1e9 / len(paths) / BLOCK)):
                    file.write(os.urandom(BLOCK))
        print("| | reading alone | checking |\n|---|---|---|")
        for how in ("cold", "warm"):
            cells = [cell(work, paths, how, args.repeats) for work in (read, checksums.sha256)]
            print(f"| {how} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
