"""Set the machine's clock under a training and a sweep, and see that both
go on, that `list` calls the run running, and that dates do not matter.

`python tools/drills/set_clock.py` (as root, on Linux). The clock itself stays:
in a mount namespace of its own /proc/stat is a file of this
drill, whose boot time moves by an hour, forward and back, as it does when a clock is set;
this is where psutil takes the start of a process from.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = ["model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2", "train.batch_size=4",
         "train.cpu=true", "train.log_with=null", "train.log_every=1"]


class Clock:
    "What /proc/stat says in this mount namespace."
    def __init__(self, folder: Path):
        self.file, self.text = folder / "stat", Path("/proc/stat").read_text()
        self.file.write_text(self.text)
        subprocess.run(["mount", "--bind", str(self.file), "/proc/stat"], check=True)

    def move(self, seconds: int):
        lines = [f"btime {int(line.split()[1]) + seconds}" if line.startswith("btime") else line
                 for line in self.text.splitlines()]
        with open(self.file, "r+") as f:   # in place: another file would not be the mounted one
            f.write("\n".join(lines) + "\n")
            f.truncate()


def lines(file: Path) -> int: return len(file.read_text().splitlines()) if file.is_file() else 0


def until(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end: return False
        time.sleep(0.1)
    return True


def listed(root: Path) -> dict[str, str]: # run → state
    out = subprocess.run([sys.executable, "-m", "dmp_wb", "list", "--json", "--folder", str(root)], capture_output=True,
                         text=True, check=True).stdout
    return {r["name"]: r["state"] for r in json.loads(out)}


def drill(work: Path) -> list[str]:
    wrong, clock, runs = [], Clock(work), work / "runs"
    env = {**os.environ, "DMP_WB_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    launch = (f"import dmp_wb as wb; wb.launch('digits-quick', {[*SMALL, 'train.steps=3000']!r}, num_processes=1, "
              f"folder={str(runs / 'launched')!r})")
    sweep = ["-m", "dmp_wb", "run", "pretrain", "-p", "seed", "0", "1",
             *(w for s in [*SMALL, "train.steps=1500", "num_samples=4", "num_inference_steps=2"]
               for w in ("-p", *s.split("=")))]
    jobs = {"launch": subprocess.Popen([sys.executable, "-c", launch], env=env, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True),
            "sweep": subprocess.Popen([sys.executable, *sweep, "--folder", str(runs / "sweep")], env=env,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)}
    with contextlib.ExitStack() as held:
        for job in jobs.values(): held.callback(job.kill)
        steps = lambda: (lines(runs / "launched" / "metrics.jsonl"),
                         sum(lines(f) for f in (runs / "sweep").glob("*/metrics.jsonl")))
        if not until(lambda: min(steps()) > 5): wrong.append("the runs did not start")
        for seconds in (3600, -3600, 2):
            before = steps()
            clock.move(seconds)
            if not until(lambda before=before: all(a > b for a, b in zip(steps(), before))
                         or any(j.poll() is not None for j in jobs.values())):
                wrong.append(f"nothing went on after the clock moved by {seconds} s")
            alive = [n for n, j in jobs.items() if j.poll() is None]
            states = listed(runs)
            if "launch" in alive and states.get("launched") != "running":
                wrong.append(f"after {seconds} s, list calls the launched run {states.get('launched')}")
        for name, job in jobs.items():
            out = job.communicate(timeout=300)[0]
            if job.returncode: wrong.append(f"{name} ended with status {job.returncode}: {out.strip()[-300:]}")
    states = listed(runs)
    wrong += [f"{name} is {state} in the end" for name, state in states.items() if state != "finished"]
    future = time.time() + 10 * 86400   # a folder that was written by a machine whose clock is ahead
    shutil.copytree(runs / "launched", runs / "ahead")
    (runs / "ahead" / "summary.json").unlink(missing_ok=True)
    for f in (runs / "ahead").rglob("*"): os.utime(f, (future, future))
    if listed(runs)["ahead"] == "running":
        wrong.append("a run with dates in the future, that nobody writes, is called running")
    return wrong


def main() -> int:
    if "DMP_WB_OWN_MOUNTS" not in os.environ:
        if os.geteuid() or not shutil.which("unshare"):
            sys.exit(
                "set_clock.py needs root and unshare: it mounts a file over /proc/stat in a mount namespace of its own")
        os.execvpe("unshare", ["unshare", "-m", sys.executable, *sys.argv], {**os.environ, "DMP_WB_OWN_MOUNTS": "1"})
    with tempfile.TemporaryDirectory() as d:
        begun = time.monotonic()
        wrong = drill(Path(d))
    print(f"the clock moved by an hour, back, and by two seconds: "
          f"{'training and sweep finished, list right throughout' if not wrong else 'WRONG: ' + '; '.join(wrong)} "
          f"({time.monotonic() - begun:.0f} s)")
    return min(len(wrong), 1)


if __name__ == "__main__": sys.exit(main())
