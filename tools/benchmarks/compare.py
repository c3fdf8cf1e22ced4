"""What `dmp-wb compare` costs: `python tools/benchmarks/compare.py [--runs 20] [--rounds 3] [--keep FOLDER]`.

Makes short runs of digits, half of them patched, and compares them by the command, in turn without kept samples
(first) and with those that the first has left in the run folders (second). Says CPU seconds of the command and its
kernel, which do not count what other processes take, wall seconds, and what the machine did meanwhile (load). The
pages of the two must hold the same table of distances.
"""
import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def make(folder: Path, runs: int, steps: int) -> list[str]:
    "The names of finished runs below a folder; those that are there are not made again."
    import dmp_wb as wb
    names = [f"{i:02d}-{'dmp' if i % 2 else 'quick'}" for i in range(runs)]
    for i, name in enumerate(names):
        if (folder / name / "summary.json").exists(): continue
        wb.train("digits-dmp" if i % 2 else "digits-quick",
                 [f"name={name}", f"train.steps={steps}", f"train.checkpoint_every={steps}", "train.log_every=10",
                  f"seed={i}"])
    return names


def compared(names: list[str], page: Path) -> tuple[float, float, str]:
    "CPU seconds, wall seconds, and the page's table of distances."
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    cpu, start = used(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "dmp_wb", "compare", *names, "--output", str(page)], check=True)
    taken = used() - cpu, time.perf_counter() - start
    table = re.search(r"Fréchet distance.*?</table>", page.read_text(encoding="utf-8"), re.S)
    assert table, "the page has no table of distances"
    return *taken, table[0]


def said(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:6.1f} ({low:.1f}–{high:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="Make the runs here, or take those that are here.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = (args.keep or Path(work) / "runs").resolve()
        os.environ["DMP_WB_RUNS"] = str(folder)
        names, found, tables = make(folder, args.runs, args.steps), {"first": [], "second": []}, set()
        for _ in range(args.rounds):
            for kept in folder.glob("*/samples/drawn-*"): shutil.rmtree(kept)
            for kind in found:
                *taken, table = compared(names, Path(work) / f"{kind}.html")
                found[kind].append(taken)
                tables.add(table)
                print(f"{kind}: {taken[0]:.1f} s of CPU, {taken[1]:.1f} s by the clock, load {os.getloadavg()[0]:.1f}",
                      flush=True)
        assert len(tables) == 1, "kept samples gave other distances"
    print(f"\n{args.runs} runs, {os.cpu_count()} cores, {args.rounds} rounds; median (quartiles)")
    for kind, taken in found.items():
        cpu, wall = map(list, zip(*taken))
        print(f"{kind:7} CPU {said(cpu)} s   clock {said(wall)} s")


if __name__ == "__main__": main()
