"""What it costs, and brings, that torch's threads sleep while they wait for each other (OMP_WAIT_POLICY=PASSIVE).

`python tools/benchmarks/waiting.py [--rounds 5] [--neighbours 1] [--steps 150]`: the digits experiment of `make demo`,
trained in a process of its own on all cores, with torch's own way of waiting and with passive waiting, alone on the
machine and beside other processes that are always busy. The four take turns, so that what else runs meanwhile meets all
of them alike. Prints steps a second and CPU time a step, and the ratios: medians, and quartiles in brackets.

`beside / alone` says what is left of the speed (passive: at least 0.4 is wanted, of two cores beside one busy process);
`passive / torch's own, alone` what passive waiting costs where nothing else runs, which says something on a quiet
machine only: the load is printed.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = """
import time
import dmp_wb as wb
settings = ["train.log_with=null", "train.checkpoint_every=100000", "train.log_every=100000"]
wb.train("digits-dmp", [*settings, "train.steps=20"], folder="warm")
start, cpu = time.perf_counter(), time.process_time()
wb.train("digits-dmp", [*settings, "train.steps={steps}"], folder="run")
print("measured", {steps} / (time.perf_counter() - start), (time.process_time() - cpu) / {steps})
"""
BUSY = "while True: sum(range(100000))"
WAYS = {"torch's own": None, "passive": "PASSIVE"}


def trained(policy: str | None, steps: int) -> tuple[float, float]:
    "Steps a second and CPU seconds a step of one training in a new process; None: what torch does untold."
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    # the package leaves what the user has set, and libgomp takes a value that it does not know for none
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": policy or "UNDEFINED",
            "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", TRAIN.replace("{steps}", str(steps))], cwd=folder, env=env,
                              capture_output=True, text=True, check=True)
    speed, cpu = done.stdout.split("measured")[-1].split()
    return float(speed), float(cpu)


def beside(neighbours: int, policy: str | None, steps: int) -> tuple[float, float]:
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(neighbours)]
    try: return trained(policy, steps)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def middle(values: list[float], digits: int = 2) -> str:
    quarter = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{statistics.median(values):.{digits}f} ({quarter[0]:.{digits}f}–{quarter[2]:.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes beside it")
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for i in range(args.rounds):
        print(f"round {i + 1}: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it", flush=True)
        for name, policy in WAYS.items():
            for count in (0, args.neighbours):
                found.setdefault((name, count), []).append(beside(count, policy, args.steps))
    for (name, count), values in found.items():
        print(f"{name}, {f'beside {count} busy' if count else 'alone'}: {middle([v[0] for v in values], 1)} steps/s, "
              f"{middle([1000 * v[1] for v in values], 0)} ms of CPU time a step")
    ratio = lambda a, b: middle([x[0] / y[0] for x, y in zip(found[a], found[b], strict=True)])
    for name in WAYS: print(f"beside / alone, {name}: {ratio((name, args.neighbours), (name, 0))}")
    print("passive / torch's own, alone:", ratio(("passive", 0), ("torch's own", 0)))


if __name__ == "__main__": main()
