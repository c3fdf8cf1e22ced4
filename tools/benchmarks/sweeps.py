"""What a sweep costs: `python tools/benchmarks/sweeps.py [--runs 12] [--steps 600]`.

The same trainings three ways, each with its own folders:
a plain loop, which executes the code of the run notebook in one process that has imported everything
once; `dmp-wb run` with one job; and with two. Each process has one thread, so that a second job has a core to itself.
Wants a quiet machine.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = {"OMP_NUM_THREADS": "1"}
SMALL = {"num_samples": 20, "num_inference_steps": 10, "model.hidden_size": 32, "model.num_layers": 2,
         "model.num_attention_heads": 2, "train.batch_size": 32, "train.cpu": "true"}

LOOP = """
import json, os, sys, time
import nbformat
from dmp_wb.sweeps import find_notebook, plan
os.environ.setdefault("MPLBACKEND", "agg")
notebook, folder = find_notebook("pretrain"), sys.argv[2]
seeds, fixed = json.loads(sys.argv[1]), json.loads(sys.argv[3])
cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
for p in plan("pretrain", fixed, {"seed": seeds}):
    os.environ["DMP_WB_RUN"] = f"{folder}/{p.name}"
    scope = {"__name__": "__main__"}
    begun = time.perf_counter()
    for cell in cells:
        exec(cell.source, scope)
        if "parameters" in cell.metadata.get("tags", []): scope.update(p.parameters)
    print(f"  {p.name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
"""


def seconds(command):
    "Of the clock, and of the processors."
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    begun, before = time.perf_counter(), used()
    done = subprocess.run(command, env={**os.environ, **THREADS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.perf_counter() - begun, used() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    a = parser.parse_args()
    fixed, seeds = {**SMALL, "train.steps": a.steps}, list(range(a.runs))
    with tempfile.TemporaryDirectory() as d:
        loop, cpu = seconds([sys.executable, "-c", LOOP, json.dumps(seeds), f"{d}/loop", json.dumps(fixed)])
        print(f"plain loop, one process    {loop:7.1f} s   processors {cpu:7.1f} s", flush=True)
        words = ["pretrain", *(w for k, v in fixed.items() for w in ("-p", k, str(v))), "-p", "seed", *map(str, seeds)]
        times = {}
        for jobs in (1, 2):
            times[jobs], cpu = seconds([sys.executable, "-m", "dmp_wb", "run", *words, "--folder", f"{d}/jobs-{jobs}",
                                        "--jobs", str(jobs)])
            print(f"dmp-wb run, {jobs} job{'s' if jobs > 1 else ' '}         {times[jobs]:7.1f} s   processors "
                  f"{cpu:7.1f} s", flush=True)
        same = all((Path(d) / "loop" / f"seed={s}/model").exists()
                   and (Path(d) / "loop" / f"seed={s}/model/diffusion_pytorch_model.safetensors").read_bytes()
                   == (Path(d) / f"jobs-2/seed={s}/model/diffusion_pytorch_model.safetensors").read_bytes()
                   for s in seeds)
    print(f"{a.runs} runs: 2 jobs take {times[2] / times[1]:.2f} × the time of 1 job; a run costs "
          f"{(times[1] - loop) / a.runs:+.1f} s over the plain loop; weights {'equal' if same else 'DIFFER'}")
    return 0 if same else 1


if __name__ == "__main__": sys.exit(main())
