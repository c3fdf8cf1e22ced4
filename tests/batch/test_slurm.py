"""Sweeps on a real Slurm of one node, which tools/slurm.sh starts: states, pre-emption, time limits, requeue, scancel.

Skipped where there is no Slurm to start; with $DMP_WB_REQUIRE_SLURM=1 (as in .ci/run) that is a failure.
What was seen is kept in slurm-test.log in $DMP_WB_SCREENSHOTS, or else in pytest's folder.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from safetensors.torch import load_file

import dmp_wb as wb
from dmp_wb.store.checkpoints import newest_checkpoint
from dmp_wb.store.run import Run
from dmp_wb.batch.state import read_state
from dmp_wb.batch.slurm import job_states, OVER
from dmp_wb.batch.view import line_of

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm.sh"
REQUIRED = os.environ.get("DMP_WB_REQUIRE_SLURM") == "1"
SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.log_every=1", "train.checkpoint_every=100000"]

# trains four steps a second until there is a file `go`, and then as fast as it can:
# what is done to its job meanwhile does not depend on the machine
NOTEBOOK = '''
import time
import dmp_wb as wb, dmp_wb.training.loop as training
from dmp_wb.batch.notebook import here, listed
exp = wb.load_experiment(experiment, listed(overrides))
folder = here("", "run")
append = training.append_row
def slow(run, row):
    append(run, row)
    if not (folder / "go").exists() and not fast: time.sleep(0.25)
training.append_row = slow
run = wb.launch(exp, folder=folder, num_processes=num_processes) if num_processes > 1 else wb.train(exp, folder=folder)
'''


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = Path(os.environ.get("DMP_WB_SCREENSHOTS") or tmp_path_factory.getbasetemp())
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "slurm-test.log", "w", encoding="utf-8", buffering=1) as f:
        yield lambda text: f.write(f"[{time.strftime('%H:%M:%S')}] {text.rstrip()}\n")


@pytest.fixture(scope="module")
def slurm(log):
    "SLURM_CONF of a Slurm that runs."
    have = all(shutil.which(c, path=f"{os.environ['PATH']}:/usr/sbin")
               for c in ("sbatch", "slurmctld", "slurmd", "munged"))
    if not REQUIRED and not (have and os.getuid() == 0):
        pytest.skip("no Slurm here that could be started: expected slurm-wlm, munge and root (tools/slurm.sh install, "
                    "or DMP_WB_REQUIRE_SLURM=1)")
    was_there = Path(os.environ.get("DMP_WB_SLURM_DIR", "/tmp/dmp-wb-slurm")).exists()
    if REQUIRED: subprocess.run([str(SCRIPT), "install"], check=True)
    done = subprocess.run([str(SCRIPT), "start"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    os.environ["SLURM_CONF"] = done.stdout.strip().split("=", 1)[1]
    log(command("sinfo", "--version") + command("sinfo"))
    yield os.environ["SLURM_CONF"]
    os.environ.pop("SLURM_CONF")
    if not was_there: subprocess.run([str(SCRIPT), "stop"], check=True)


pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def command(*words): return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def until(what, limit=240):
    "Wait for a condition, and return its value."
    end = time.monotonic() + limit
    while not (value := what()):
        assert time.monotonic() < end, f"waited {limit} s; {command('squeue', '--states=all')}"
        time.sleep(0.2)
    return value


def notebook(folder):
    cells = [nbformat.v4.new_code_cell('experiment = "digits-quick"\noverrides = ""\nnum_processes = 1\nfast = False',
                                       metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(NOTEBOOK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, "dmp_wb": {"page": True}}),
                   folder / "job.ipynb")
    return str(folder / "job.ipynb")


@contextlib.contextmanager
def one_thread():
    "As the jobs have: sums over two threads differ in their last bit."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield
    finally: torch.set_num_threads(threads)


def overrides(steps): return " ".join([*SMALL, f"train.steps={steps}"])


@pytest.fixture(autouse=True)
def none_left(runs_folder):
    "A test that fails leaves no sweep and no job behind."
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if str(runs_folder.parent) in " ".join(process.cmdline()): process.kill()
    if "SLURM_CONF" in os.environ: subprocess.run(["scancel", "--full", "--user=root"])


class Sweep:
    "`dmp-wb run` as a user starts it; its lines go to the log."
    def __init__(self, log, runs_folder, *arguments):
        self.log, self.file = log, runs_folder.parent / f"sweep-{time.monotonic_ns()}.txt"
        log("$ dmp-wb run "
            + " ".join(a if a else "''" for a in map(str, arguments)).replace(str(runs_folder.parent), "…"))
        with open(self.file, "w") as f:
            self.process = subprocess.Popen([sys.executable, "-m", "dmp_wb", "run", *map(str, arguments)], stdout=f,
                                            stderr=f, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def end(self, status, limit=300):
        try: self.process.wait(limit)
        finally:
            if self.process.poll() is None: self.process.kill()
            text = self.file.read_text()
            self.log(
                "\n".join(f"    {line}" for line in text.splitlines()) + f"\n    exit status {self.process.returncode}")
        assert self.process.returncode == status, text
        return text


def state(folder): return json.loads((folder / "run.json").read_text())


def steps(folder): return Run(folder).metrics().get("step", [])


def job_of(folder): return json.loads((folder / ".sweep" / "slurm.json").read_text())


def back_in_the_queue(job):
    "A job that is queued again waits two minutes; a test does not."
    until(lambda: job_states([job])[job] == "PENDING")
    command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=60")


def test_a_sweep_gives_what_it_gives_on_this_machine(slurm, log, runs_folder, tmp_path):
    common = [notebook(tmp_path), "-p", "overrides", overrides(6), "-p", "fast", "true", "-p", "optim.lr", "1e-3",
              "2e-3", "1e30"]
    text = Sweep(log, runs_folder, *common, "--name", "far", "--jobs", 2, "--cluster", "slurm", "--partition", "main",
                 "--timeout-min", 30, "--cpus-per-task", 1, "--mem-gb", 1).end(1)
    assert ("error: lr=1e+30 failed in cell 3: FloatingPointError: the loss or gradient is not finite" in text
            and "2 finished, 1 failed" in text)
    far = runs_folder / "far"
    assert {n: state(far / n)["status"] for n in ("lr=0.001", "lr=0.002", "lr=1e+30")} == {
        "lr=0.001": "finished", "lr=0.002": "finished", "lr=1e+30": "failed"}
    assert (far / "lr=1e+30" / "run.html").exists() and (far / "lr=0.001" / "run.ipynb").exists()
    script = next((far / ".sweep" / "jobs").glob("*_submission.sh")).read_text()
    for line in ("--partition=main", "--time=30", "--cpus-per-task=1", "--mem=1GB", "--array=0-2%2",
                 "--signal=USR2@120", "--job-name=far"):
        assert f"#SBATCH {line}\n" in script, line
    log(command("squeue", "--states=all", "--format=%.8i %.10j %.10P %.10T %.6C %.8m %.10l"))

    with one_thread():
        for name in ("lr=0.001", "lr=0.002"):
            near = wb.train("digits-quick", [*overrides(6).split(), f"optim.{name}"], folder=tmp_path / name)
            assert Run(far / name).metrics()["loss"] == near.metrics()["loss"]


def test_one_run_through_all_that_a_cluster_does(slurm, log, runs_folder, tmp_path):
    """Ctrl-C and watching again, its time limit, a pre-emption, requeue, scancel:
    and its figures are those of a run that nobody touched."""
    arguments = [notebook(tmp_path), "-p", "overrides", overrides(1000), "--name", "hard", "--cluster", "slurm",
                 "--partition", "low", "--timeout-min", 60]
    folder = runs_folder / "hard"
    sweep = Sweep(log, runs_folder, *arguments)
    until(lambda: len(steps(folder)) >= 2)
    job, seen = job_of(folder)["."], []
    # progress comes over files
    line = until(lambda: re.match(r"cell 3/3  digits-quick  \d+/1000 +\d+%  [\d.]+ step/s  ETA [\d:]+  loss [\d.]+$",
                                  line_of(folder, read_state(folder))))
    log(f"job {job}: {line[0]}")

    def interrupted(how):
        "The run stops with a checkpoint, its job stays, and it goes on from there."
        until(lambda: job_states([job])[job] in ("COMPLETING", "PENDING"), 120)
        until(lambda: state(folder)["status"] in ("waiting", "stopped"))
        at = int(newest_checkpoint(folder).name.removeprefix("step-"))
        assert at == steps(folder)[-1] and (not seen or at > seen[-1])
        seen.append(at)
        log(f"{how}: job {job} is {job_states([job])[job]}, run is {state(folder)['status']}, newest checkpoint {at}")
        back_in_the_queue(job)
        until(lambda: state(folder)["status"] == "running" and steps(folder)[-1] > at)
        log(f"job {job} runs again: step {steps(folder)[-1]}, attempt {state(folder)['attempts']}")

    sweep.process.send_signal(signal.SIGINT)                                     # the jobs go on
    text = sweep.end(130)
    assert (f"the jobs go on; run the same again to watch them, or end them: scancel {job}" in text
            and job_states([job])[job] == "RUNNING")
    sweep = Sweep(log, runs_folder, *arguments)                                  # takes the job that is there
    with pytest.raises(AssertionError): until(lambda: len(command("squeue", "-h", "--name=hard").splitlines()) > 1, 10)

    hours, minutes = (int(n) for n in command("scontrol", "show", "job", job).split("RunTime=")[1][:5].split(":"))
    # now it is near: the signal comes two minutes before
    command("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    interrupted("two minutes before the time limit")
    high = command("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap",
                   "sleep 1").strip()
    interrupted(f"pre-empted by job {high}")
    command("scontrol", "requeue", job)
    interrupted("scontrol requeue")
    # the same job all the while, and the sweep watches it
    assert job_of(folder)["."] == job and sweep.process.poll() is None

    command("scancel", job)
    text = sweep.end(1)
    assert (f"stopped: hard: its job {job} was cancelled; run again to go on" in text
            and state(folder)["status"] == "stopped")
    at = steps(folder)[-1]
    assert newest_checkpoint(folder).name == f"step-{at:07d}"
    (folder / "go").touch()
    text = Sweep(log, runs_folder, *arguments).end(0)
    assert job_of(folder)["."] != job and "hard  finished" in text
    run = Run(folder)
    assert steps(folder) == list(range(1, 1001)) and state(folder)["attempts"] == 5

    with one_thread(): unbroken = wb.train("digits-quick", overrides(1000).split(), folder=tmp_path / "unbroken")
    for key in ("loss", "mse", "grad_norm", "lr"): assert run.metrics()[key] == unbroken.metrics()[key], key
    a, b = (load_file(r.folder / "model" / "diffusion_pytorch_model.safetensors") for r in (run, unbroken))
    assert all(torch.equal(a[k], b[k]) for k in b)
    log(f"finished after interruptions at steps {seen} and a cancelled job at step {at}: {len(b)} tensors and 1000 "
        f"lines of metrics as those of an unbroken run, to the bit; loss {run.summary['loss']:.6f}")


def test_two_processes_in_a_job(slurm, log, runs_folder, tmp_path):
    "wb.launch in a job: Slurm's SIGTERM goes to every process of it at once."
    folder = runs_folder / "two"
    cpus = ["--cpus-per-task", 2] if len(os.sched_getaffinity(0)) > 1 else []
    sweep = Sweep(log, runs_folder, notebook(tmp_path), "-p", "overrides", overrides(1000000), "-p", "num_processes", 2,
                  "--name", "two", "--cluster", "slurm", "--partition", "main", *cpus)
    until(lambda: len(steps(folder)) >= 3)
    job = job_of(folder)["."]
    ours = [p for p in psutil.process_iter(["cmdline"])
            if "--folder" in (p.info["cmdline"] or []) and str(folder) in p.info["cmdline"]]
    assert len(ours) >= 3                                                         # accelerate, torchrun, two that train
    log("\n".join(["processes of the job:", *(f"    {' '.join(p.info['cmdline'])[:140]}" for p in ours)]).replace(
        str(runs_folder.parent), "…"))
    command("scontrol", "requeue", job)
    until(lambda: state(folder)["status"] == "stopped")
    assert newest_checkpoint(folder).name == f"step-{steps(folder)[-1]:07d}"
    at = steps(folder)[-1]
    back_in_the_queue(job)
    until(lambda: state(folder)["status"] == "running" and steps(folder)[-1] > at)
    log(f"requeued with a checkpoint at step {at}, and went on: step {steps(folder)[-1]}")
    command("scancel", job)
    sweep.end(1)
    until(lambda: not any(p.is_running() for p in ours), 60)
    assert steps(folder) == list(range(1, steps(folder)[-1] + 1))


STEADY = "optim.lr_scheduler=constant"   # the first steps of a run of any length are the same


@pytest.fixture(scope="module")
def two_here(tmp_path_factory):
    "The first steps of two processes on one machine, to compare with."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OMP_NUM_THREADS", "1")
        m.setattr(os, "cpu_count", lambda: 2)
        return wb.launch("digits-quick", [*overrides(6).split(), STEADY], num_processes=2,
                         folder=tmp_path_factory.mktemp("two") / "run")


def test_a_sweep_over_two_nodes(slurm, log, runs_folder, tmp_path, two_here):
    text = Sweep(log, runs_folder, notebook(tmp_path), "-p", "overrides", f"{overrides(6)} {STEADY}", "-p", "fast",
                 "true", "-p", "num_processes", 2, "--name", "nodes", "--cluster", "slurm", "--partition", "two",
                 "--slurm", "nodes=2", "--timeout-min", 30).end(0)
    folder = runs_folder / "nodes"
    assert "nodes  finished" in text
    log((folder / "launch.log").read_text() + (folder / "launch-1.log").read_text())
    assert "2 processes over 2 machines, here 1" in (folder / "launch-1.log").read_text()
    assert Run(folder).metrics()["loss"] == two_here.metrics()["loss"]
    a, b = (load_file(r / "model" / "diffusion_pytorch_model.safetensors") for r in (folder, two_here.folder))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_script_of_the_page_over_two_nodes(slurm, log, runs_folder, tmp_path, two_here):
    "Its signal ends both launches with a checkpoint, the script puts itself into the queue again, and goes on."
    page = nbformat.read(SCRIPT.parents[1] / "nbs" / "howto" / "several_gpus.ipynb", 4)
    text = next(m[1] for c in page.cells if (m := re.search(r"```bash\n(#!/bin/bash.*?)```", c.source, re.S)))
    folder, steps_file = runs_folder / "page", tmp_path / "steps"
    for old, new in {" --gpus-per-node=8 --cpus-per-task=64": " --cpus-per-task=1 --partition=two",
                     "--time=24:00:00": f"--time=30 --output={tmp_path}/job.log --open-mode=append",
                     "run=runs/my-run": f"run={folder}", "dmp-wb launch": f"{sys.executable} -m dmp_wb launch",
                     # both are this machine
                     '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "127.0.0.1",
                     "my-experiment.yaml train.mixed_precision=bf16":
                     f"digits-quick {overrides(0).rpartition(' ')[0]} train.steps=$(cat {steps_file})"
                     f" {STEADY}"
                     " --num-processes 2 --machine-timeout 240"}.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "job.sh").write_text(text)
    steps_file.write_text("1000000")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OMP_NUM_THREADS", "1")
        job = command("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    said = tmp_path / "job.log"
    try:
        until(lambda: len(steps(folder)) >= 8)
        command("scancel", "--signal=USR1", job)   # as Slurm sends it before the time is over: to the steps
        until(lambda: newest_checkpoint(folder) is not None and job_states([job])[job] == "PENDING")
        at = int(newest_checkpoint(folder).name.removeprefix("step-"))
        assert at == steps(folder)[-1] and "stopped by a signal" in said.read_text()
        steps_file.write_text(str(at + 5))
        time.sleep(3)   # nodes refuse a job that is started again in the second in which it has ended
        back_in_the_queue(job)
        until(lambda: Run(folder).finished and job_states([job])[job] in OVER)
    finally: log(said.read_text() if said.exists() else "no output")
    assert steps(folder) == list(range(1, at + 6)) and f"resumed at step {at}" in said.read_text()
    assert Run(folder).metrics()["loss"][:6] == two_here.metrics()["loss"]


def test_what_slurm_refuses_is_one_line(slurm, log, runs_folder, tmp_path):
    arguments = [notebook(tmp_path), "-p", "overrides", overrides(5), "--name", "no", "--cluster", "slurm"]
    for more, message in ((["--partition", "gpuu"], "invalid partition"),
                          (["--partition", "main", "--slurm", "tine=5"],
                           "unknown option of slurm 'tine': did you mean 'time'"), (["--mem-gb", "1e6"], "Memory")):
        text = Sweep(log, runs_folder, *arguments, *more).end(2)
        last = text.strip().splitlines()[-1]
        assert last.startswith("error: ") and message.lower() in last.lower(), text
    assert command("squeue", "-h", "--name=no") == ""


def test_jobs_that_slurm_does_not_know(slurm):
    assert job_states(["999999", "999998_3"]) == {"999999": "GONE", "999998_3": "GONE"} and "GONE" in OVER
