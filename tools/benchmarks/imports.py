"""What importing costs, beside `import torch, diffusers`:
processor seconds of a fresh interpreter, the best of a few, all in one run.

    python tools/benchmarks/imports.py            # a table
    python tools/benchmarks/imports.py --rounds 5
"""
import argparse
import os
import subprocess
import sys

import dmp_wb

BASE = "import torch, diffusers"
COMMAND = "import sys; sys.argv = ['dmp-wb', {!r}]\ntry: from dmp_wb.cli import main; main()\nexcept SystemExit: pass"
NAMES = ("patch", "load_model", "sample", "train", "evaluate")   # what users type first
LIMIT = 1.5   # times BASE that `import dmp_wb` may cost


def seconds(code: str, rounds: int) -> float:
    "User and system seconds of a fresh interpreter; these, unlike the clock's, do not tell what else the machine does."
    best = float("inf")
    for _ in range(rounds):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
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
