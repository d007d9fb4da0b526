"""Normalizes images that don't fit into the memory that they are given, from disk to disk, with Dask, and checks the results with NumPy alone.

A Dask worker gets --memory, and is killed when it takes more. The images, eight bands of 512 x 512 float32 pixels, are made up: --size of them.
"""

import argparse
import concurrent.futures
import os
import pathlib
import resource
import tempfile
import time

import dask.array as da
import numpy as np
from dask import delayed
from dask.distributed import Client, LocalCluster, progress
from dask.utils import format_bytes, parse_bytes
from tqdm import tqdm

import cbn
import cbn.dask

IMAGES, BANDS, PIXELS = 4, 8, (512, 512)        # of a chunk, which is a file: 34 MB
OFFSETS, SPREADS = 1000 * np.arange(1, BANDS + 1, dtype="f"), np.arange(1, BANDS + 1, dtype="f")
THREADS = 2


def name(folder, chunk):
    return folder / f"{chunk:05}.npy"


def by_band(a):
    return a[:, np.newaxis, np.newaxis]


def make(folder, chunk):
    x = np.random.default_rng(chunk).standard_normal((IMAGES, BANDS, *PIXELS), np.float32)
    x *= by_band(SPREADS)
    x += by_band(OFFSETS)
    np.save(name(folder, chunk), x)


def array_of_files(folder, chunks):
    """Each file is mapped while its chunk is needed: as one file, all that was read would count as the worker's memory."""
    read = lambda block_id: np.load(name(folder, block_id[0]), mmap_mode="r")
    return da.map_blocks(read, chunks=((IMAGES,) * chunks, BANDS, *PIXELS), dtype=np.float32, meta=np.empty((0,) * 4, np.float32))


def run(client, tasks, what):
    """Compute them all, with a bar that counts the tasks behind them, too; the results, and the seconds that it took."""
    print(what)
    start = time.perf_counter()
    futures = client.compute(tasks)
    progress(futures)
    print()
    return client.gather(futures), time.perf_counter() - start


def forget(folder):
    """Drop what the page cache has of the files, once it is on disk, so that the disk is read again."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(source, target=None):
    """Seconds that reading all files, and writing as many to a target, takes two threads without Dask and arithmetic."""
    def copy(file):
        x = np.load(file)
        if target is not None:
            np.save(target / file.name, x)

    files = sorted(source.iterdir())
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(tqdm(pool.map(copy, files), "plain copy" if target else "plain read", len(files)))
    return time.perf_counter() - start


def check(stats, source, target, chunks):
    """The statistics against sums in float64, and each result against the formula."""
    sums, squares, worst = np.zeros(BANDS), np.zeros(BANDS), 0
    for chunk in tqdm(range(chunks), "check"):
        x, y = np.load(name(source, chunk)).astype(np.float64), np.load(name(target, chunk))
        worst = max(worst, abs(y - (x - by_band(stats.mean)) / np.sqrt(by_band(stats.var) + 1e-5)).max())
        x -= by_band(OFFSETS)
        sums += x.sum((0, 2, 3))
        squares += (x**2).sum((0, 2, 3))
    mean, square = sums / stats.count, squares / stats.count
    errors = abs(stats.mean - OFFSETS - mean).max(), abs(stats.var / (square - mean**2) - 1).max(), worst
    print("largest errors: of a mean {:.1e}, of a variance {:.1e} of it, of a result {:.1e}".format(*errors))
    assert errors[0] < 1e-5 and errors[1] < 1e-6 and errors[2] < 2e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GB", help="of the images on disk; the results take as much again")
    parser.add_argument("--memory", default="500MB", help="of the worker")
    parser.add_argument("--folder", help="where to put both, in a folder that is deleted in the end; the system's for temporary files")
    parser.add_argument("--cold", action="store_true", help="have each pass read from the disk, not from the page cache")
    options = parser.parse_args()
    chunks = max(1, round(parse_bytes(options.size) / (4 * IMAGES * BANDS * np.prod(PIXELS))))
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        LocalCluster(n_workers=1, threads_per_worker=THREADS, memory_limit=options.memory, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        source, target = pathlib.Path(folder) / "images", pathlib.Path(folder) / "normalized"
        source.mkdir()
        target.mkdir()
        before = (lambda: forget(source)) if options.cold else (lambda: None)
        run(client, [delayed(make)(source, chunk) for chunk in range(chunks)], "make images")
        size = sum(file.stat().st_size for file in source.iterdir())

        before()
        reading = plain(source)
        before()
        x = array_of_files(source, chunks)
        (stats,), first = run(client, [cbn.dask.batch_stats(x)], "statistics")
        before()
        with tempfile.TemporaryDirectory(dir=folder) as copies:
            copying = plain(source, pathlib.Path(copies))
        before()
        y = cbn.dask.batch_norm(x, stats.mean, stats.var)
        writes = [delayed(np.save)(name(target, chunk), part) for chunk, part in enumerate(y.to_delayed().ravel())]
        _, second = run(client, writes, "normalization")

        peak = max(client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).values()) * 1024
        print(f"{format_bytes(size)} of images; the worker's limit: {options.memory}, its peak: {format_bytes(peak)}")
        print(f"statistics: {first:.1f} s, {size / first / 1e9:.2f} GB/s read, {reading / first:.0%} of plain reading's speed")
        print(f"normalization: {second:.1f} s, {2 * size / second / 1e9:.2f} GB/s in and out, {copying / second:.0%} of plain copying's speed")
        check(stats, source, target, chunks)


if __name__ == "__main__":
    main()
