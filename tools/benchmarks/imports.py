"""What importing costs, beside `import torch, diffusers`:
processor seconds of a fresh interpreter, the best of a few, all in one run. And a training of the digits up to its
first step, beside `import torch` alone, in turn: the median of the rounds' ratios.

    python tools/benchmarks/imports.py            # a table
    python tools/benchmarks/imports.py --rounds 5
"""
import argparse
import os
import statistics
import subprocess
import sys

import dmp_wb

BASE = "import torch, diffusers"
COMMAND = "import sys; sys.argv = ['dmp-wb', {!r}]\ntry: from dmp_wb.cli import main; main()\nexcept SystemExit: pass"
NAMES = ("patch", "load_model", "sample", "train", "evaluate")   # what users type first
LIMIT = 1.5   # times BASE that `import dmp_wb` may cost
# ends where the first step is done: what comes after it, a checkpoint and the exported model, is not the start
FIRST_STEP = """
import os, tempfile
os.environ["DMP_WB_RUNS"] = tempfile.mkdtemp()
import dmp_wb as wb
from dmp_wb.training.loop import Books
take = Books.take
def then_end(self, *args, **kwargs):
    take(self, *args, **kwargs)
    os._exit(0)
Books.take = then_end
wb.train("digits-quick", ["train.batch_size=16"])
"""
STEP_LIMIT = 2.5   # times `import torch` that a training up to its first step should cost


def seconds(code: str, rounds: int) -> float:
    "User and system seconds of a fresh interpreter; these, unlike the clock's, do not tell what else the machine does."
    best = float("inf")
    for _ in range(rounds):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


def first_step(rounds: int) -> float:
    "How often `import torch` goes into a training up to its first step."
    pairs = [(seconds(FIRST_STEP, 1), seconds("import torch", 1)) for _ in range(rounds)]
    ratios = sorted(step / base for step, base in pairs)
    print(f"{'import torch':34} {statistics.median(base for _, base in pairs):6.2f} s")
    print(f"{'wb.train up to the first step':34} {statistics.median(step for step, _ in pairs):6.2f} s  "
          f"{statistics.median(ratios):5.2f} × import torch ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    return statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if first_step(rounds) > STEP_LIMIT: print(f"{'':34} more than the {STEP_LIMIT} × that are aimed at")
    cases = {"import dmp_wb": "import dmp_wb", "dmp-wb --version": COMMAND.format("--version"),
             "dmp-wb --help": COMMAND.format("--help"),
             **{f"import dmp_wb; dmp_wb.{name}": f"import dmp_wb; dmp_wb.{name}" for name in NAMES},
             **{f"import dmp_wb.{module}": f"import dmp_wb.{module}" for module in dmp_wb._MODULES}}
    base = seconds(BASE, rounds)
    print(f"{BASE:34} {base:6.2f} s")
    ratios = {}
    for name, code in cases.items():
        spent = seconds(code, rounds)
        ratios[name] = spent / base
        print(f"{name:34} {spent:6.2f} s  {spent / base:5.2f} ×", flush=True)
    if ratios["import dmp_wb"] > LIMIT:
        sys.exit(f"error: import dmp_wb costs {ratios['import dmp_wb']:.2f} × {BASE!r}: expected at most {LIMIT}")


if __name__ == "__main__": main()
