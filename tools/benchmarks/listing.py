"""How much CPU `dmp-wb list` takes for many runs, some of them with long logs and pages full of pictures.

`python tools/benchmarks/listing.py [--runs 500] [--lines 100000]`. The runs are made anew in a temporary folder;
every fiftieth has all the lines
in its metrics.jsonl, and every second one a notebook with a megabyte of pictures in place of a run.json.
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

from dmp_wb.config import Experiment, to_yaml

ROW = {"step": 0, "loss": 0.123456, "mse": 0.1234, "lr": 1e-4, "grad_norm": 0.5,
       **{f"mse/t{i:03d}": 0.1 for i in range(8)}, "images_per_second": 1000.0}
SUMMARY = {"status": "finished", "steps": 400, "loss": 0.1, "evaluations": [{"fid": 1.0, "precision": 0.8}]}
PAPERMILL = {"input_path": "nbs/runs/pretrain.ipynb", "end_time": "2026-01-01", "exception": False}


def make_runs(root: Path, count: int, lines: int):
    config, log = to_yaml(Experiment()), "".join(json.dumps({**ROW, "step": i}) + "\n" for i in range(lines))
    picture = {"cell_type": "code", "source": "x",
               "outputs": [{"output_type": "display_data", "data": {"image/png": "A" * (1 << 20)}}]}
    page = json.dumps({"cells": [picture], "metadata": {"dmp_wb": {"page": True}, "papermill": PAPERMILL},
                       "nbformat": 4}, indent=1)
    for i in range(count):
        folder = root / f"sweep-{i // 50}" / f"lr={i}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        (folder / "metrics.jsonl").write_text(log if i % 50 == 0 else log[:20_000])
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        if i % 2:
            (folder / "run.json").write_text(json.dumps({"notebook": "nbs/runs/pretrain.ipynb", "status": "finished"}))
        else: (folder / "run.ipynb").write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--lines", type=int, default=100_000)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        make_runs(Path(d), a.runs, a.lines)
        for _ in range(2):   # the second time the files are in memory
            before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            out = subprocess.run([sys.executable, "-m", "dmp_wb", "list"], env={**os.environ, "DMP_WB_RUNS": d},
                                 capture_output=True, text=True, check=True)
            wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert len(out.stdout.splitlines()) == a.runs + 1 and not out.stderr, out.stderr
    print(f"{a.runs} runs, {a.runs // 50} of them with {a.lines:,} lines of metrics: {cpu:.2f} s of CPU, {wall:.2f} s")


if __name__ == "__main__": main()
