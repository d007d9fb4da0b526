"""Races cbn against the peers that are installed, layer by layer, and prints tables; see README.md for how to read them.

Each contender lives in a process of its own for each number of threads (worker.py). For every cell they make the arrays ready one after the
other, their results are compared with cbn's, and then they take turns, round after round, the order rotated by one each time.
"""

import argparse
import datetime
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import report
import workloads
from contenders import CONTENDERS, contestants
from tqdm import tqdm

TURN = 0.01  # seconds of calls in a turn
TOLERANCE = 1e-3  # of an array's largest magnitude; statistics summed in float32 need it


class Worker:
    """The process of a contender for a number of threads: in another installation's Python, of the cbn that is installed there."""

    def __init__(self, name, threads, python=None):
        self.name, self.threads = name, threads
        self.python, self.module = (python, "cbn") if python else (sys.executable, name)
        self.start()

    def start(self):
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), NUMBA_NUM_THREADS=str(self.threads), NPROC=str(self.threads))
        command = [self.python, str(Path(__file__).with_name("worker.py")), self.module]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        self.status, self.versions = self.answer()  # "ready" and the versions, or "cannot" and the reason
        if self.module != self.name:
            self.versions = f"cbn {self.versions}, of {self.python}"

    def answer(self):
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            return "cannot", f"its process ended with code {self.process.wait()}"

    def ask(self, *request):
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.start()
            return self.ask(*request)
        return self.answer()

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def differing(sample, reference):
    """Names of the arrays of which the contender's sample differs from cbn's."""
    names = []
    for name in sample.keys() & reference.keys():
        (size, some, total, magnitude), (size_, some_, total_, magnitude_) = sample[name], reference[name]
        alike = (
            size == size_
            and np.abs(some - some_).max() <= TOLERANCE * np.abs(some_).max()
            and abs(total - total_) <= TOLERANCE * magnitude_
            and abs(magnitude - magnitude_) <= TOLERANCE * magnitude_
        )
        if not alike:
            names.append(name)
    return sorted(names)


def race(cell, workers, rounds):
    """Seconds per call of each contender in each round, the number of disturbed turns, and reasons why a contender has no time.

    None, having said why, where cbn itself cannot: nothing is left to compare with.
    """
    workers = [worker for worker in workers if worker.module in contestants(cell.op)]
    cannot, ready, reference = {}, [], None
    for worker in workers:
        status, answer = worker.ask("prepare", cell)
        if status == "cannot":
            if worker.name == "cbn":
                return tqdm.write(f"{cell.name}: left out, as cbn {answer}")
            cannot[worker.name] = answer
            continue
        reference = reference or answer  # cbn is the first
        wrong = differing(answer, reference)
        if wrong:
            cannot[worker.name] = f"its {' and '.join(wrong)} differ from cbn's"
            worker.ask("free")
        else:
            ready.append(worker)
    seconds = {worker.name: [] for worker in ready}
    disturbed = dict.fromkeys(seconds, 0)
    for number in range(rounds):
        first = number % len(ready)
        for worker in ready[first:] + ready[:first]:
            time, was_disturbed = worker.ask("turn", TURN)
            seconds[worker.name].append(time)
            disturbed[worker.name] += was_disturbed
    for worker in ready:
        worker.ask("free")
    return {"cell": asdict(cell), "seconds": seconds, "disturbed": disturbed, "cannot": cannot}


def machine():
    """What the figures depend on."""

    def read(path):
        path = Path(path)
        return path.read_text().strip() if path.exists() else ""

    model = next((line.split(":")[1].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")), "")
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        name = f"L{read(folder / 'level')} {read(folder / 'type').lower()}"
        caches[name] = f"{read(folder / 'size')} shared by cores {read(folder / 'shared_cpu_list')}"
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": workloads.cores(),
        "caches": caches,
        "memory": " ".join(read("/proc/meminfo").partition("\n")[0].split()[1:]),
        "huge pages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def installation(text):
    """The type of the option --also: NAME=PYTHON."""
    name, _, python = text.partition("=")
    if not name.isidentifier() or name in CONTENDERS:
        raise argparse.ArgumentTypeError(f"{name!r} is no name for it: expected NAME=PYTHON, the name a word that no contender has")
    if not shutil.which(python):
        raise argparse.ArgumentTypeError(f"{python!r} can't be run: expected NAME=PYTHON, the Python of an environment in which cbn is installed")
    return name, python


def several(convert, allowed=None):
    """The type of an option that takes values separated by commas."""

    def parse(text):
        values = [convert(value) for value in text.split(",")]
        if unknown := [value for value in values if allowed and value not in allowed]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(map(str, allowed))}")
        return values

    return parse


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    networks = [*workloads.NETWORKS, "all"]
    help_networks = f"of {', '.join(networks)}; by default resnet50, and images for normalize_images; with --quick, all"
    add("--network", type=several(str, networks), metavar="NAME,...", help=help_networks)
    add("--batch", type=several(int), metavar="N,...", help="batch sizes; by default each network's own")
    ops = [*workloads.EVERY_OP, "fused"]
    add("--ops", type=several(str, ops), metavar="OP,...", help=f"of {', '.join(ops)}; by default the first three, with --quick more")
    add("--layouts", type=several(str, workloads.LAYOUTS), default=workloads.LAYOUTS, metavar="LAYOUT,...", help="where the channels are")
    add("--threads", type=several(int), metavar="N,...", help="by default 1 and the number of cores; with --quick the latter")
    add("--contenders", type=several(str, CONTENDERS), default=CONTENDERS, metavar="NAME,...", help="besides cbn")
    add("--also", type=installation, action="append", default=[], metavar="NAME=PYTHON", help="another installation of cbn; any number of times")
    add(
        "--output", choices=[*workloads.OUTPUTS, "both"], default="given", help="whether the caller provides the output array; by default given"
    )
    add("--rounds", type=int, help="by default 9; with --quick 5")
    add("--min-mb", type=float, default=0, help="leave out smaller arrays")
    add("--max-mb", type=float, default=math.inf, help="leave out larger arrays")
    add("--quick", action="store_true", help="a representative selection of layers, in under two minutes")
    add("--json", metavar="FILE", help="write all times, the machine, and the versions")
    add("--plot", metavar="FILE", help="draw speed over size")
    return parser.parse_args()


def main():
    chosen = options()
    networks = chosen.network or (["all"] if chosen.quick else ["resnet50", "images"])
    networks = [*workloads.NETWORKS] if "all" in networks else networks
    outputs = workloads.OUTPUTS if chosen.output == "both" else [chosen.output]
    threads = chosen.threads or sorted({workloads.cores()} | ({1} if not chosen.quick else set()))
    sizes = chosen.min_mb, chosen.max_mb
    ops = chosen.ops and [op for name in chosen.ops for op in (workloads.FUSED if name == "fused" else [name])]
    cells = workloads.cells(networks, chosen.batch, ops, chosen.layouts, threads, outputs, sizes, chosen.quick)
    involved = {name for op in {cell.op for cell in cells} for name in contestants(op)}
    names = [name for name in CONTENDERS if name == "cbn" or name in chosen.contenders and name in involved]
    result = {
        "command": shlex.join(["python", "benchmarks/race.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "also": [name for name, _ in chosen.also],
        "versions": {},
        "missing": {},
        "cells": [],
    }
    rounds = chosen.rounds or (5 if chosen.quick else 9)
    measured = {}
    progress = tqdm(total=len(cells), unit="cell", disable=None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped in either way, it reports what it has
    try:
        for number in threads:
            workers = []
            for worker in (Worker(name, number, python) for name, python in [*((name, None) for name in names), *chosen.also]):
                if worker.status == "ready":
                    workers.append(worker)
                result["versions" if worker.status == "ready" else "missing"][worker.name] = worker.versions
            if not workers or workers[0].name != "cbn":
                sys.exit(f"cbn: {result['missing']['cbn']}")
            queue = [cell for cell in cells if cell.threads == number]
            for cell in queue:
                progress.set_description(cell.name)
                spoiled_before = cell in measured
                times = race(cell, workers, rounds)
                if times:
                    measured[cell] = times
                if times and times["disturbed"]["cbn"] > rounds / 2 and not spoiled_before:
                    queue.append(cell)  # once more, when the others may have gone
                else:
                    progress.update()
            for worker in workers:
                worker.stop()
    except KeyboardInterrupt:
        print("Interrupted: these are the cells until then.")
    finally:
        progress.close()
        result["cells"] = [measured[cell] for cell in cells if cell in measured]
        if chosen.json:
            Path(chosen.json).write_text(json.dumps(result) + "\n")
    print(report.text(result))
    if chosen.plot:
        report.plot(result, chosen.plot)
    return 1 if report.spoiled(result) else 0


if __name__ == "__main__":
    sys.exit(main())
