"""What it costs, and brings, that torch's threads sleep while they wait for each other (OMP_WAIT_POLICY=PASSIVE).

`python tools/benchmarks/waiting.py [--rounds 5] [--neighbours 2] [--steps 300]`: the digits experiment of `make demo`,
trained in a process of its own with torch's own way of waiting and with passive waiting, in turn; alone on the machine,
and beside other processes that keep its cores busy. Prints the median steps per second of each.
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
start = time.perf_counter()
wb.train("digits-dmp", [*settings, "train.steps={steps}"], folder="run")
print("steps per second", {steps} / (time.perf_counter() - start))
"""
BUSY = "while True: sum(range(100000))"


def steps_per_second(policy: str | None, steps: int) -> float:
    "Of one training in a new process; None: what torch does without being told."
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    # the package leaves what the user has set, and libgomp takes a value that it does not know for none
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": policy or "UNDEFINED"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", TRAIN.replace("{steps}", str(steps))], cwd=folder, env=env,
                              capture_output=True, text=True, check=True)
    return float(done.stdout.split("steps per second")[-1])


def measure(title: str, rounds: int, steps: int):
    found = {"torch's own": [], "passive": []}
    for _ in range(rounds):
        for name, policy in (("torch's own", None), ("passive", "PASSIVE")):
            found[name].append(steps_per_second(policy, steps))
    own, passive = (statistics.median(v) for v in found.values())
    print(f"{title}: {own:.1f} steps/s as torch waits, {passive:.1f} passively: {100 * (passive / own - 1):+.1f} %; "
          + ", ".join(f"{k} {' '.join(f'{v:.1f}' for v in vs)}" for k, vs in found.items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count(), help="busy processes beside it; 0: none")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure("alone", args.rounds, args.steps)
    if not args.neighbours: return
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.neighbours)]
    try: measure(f"beside {args.neighbours} busy processes", args.rounds, args.steps)
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__": main()
