"Batches of runs: what is planned, what is refused, and what happens when runs fail, are stopped or are killed."
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import nbformat
import psutil
import pytest
from drills.kill_a_sweep import SMALL, drill, figures, left_behind
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from dmp_wb.batch import engine
from dmp_wb.batch import execute
from dmp_wb.batch import state as batch_state
from dmp_wb.batch import jobs
from dmp_wb.batch import plan as batch_plan
from dmp_wb.batch import sweep as batch_sweep
from dmp_wb.batch import view
from dmp_wb.batch import worker as batch_worker
from dmp_wb.core.errors import BadInput
from dmp_wb.core.files import read_json
from dmp_wb.core.processes import process_identity
from dmp_wb.batch.state import FAILED, FINISHED, read_state, STOPPED, WAITING
from dmp_wb.batch.jobs import gpu_share
from dmp_wb.batch.plan import plan, read_sweep
from dmp_wb.batch.sweep import sweep
from dmp_wb.batch.view import Sweep, View

PARAMETERS = """x = 1       # where the numbers start
fail = ""
steps = 3
pause = 0.0"""
WORK = """import json, os, signal, time
from dmp_wb.core.bars import progress
from dmp_wb.core.files import write_atomic, write_json
from dmp_wb.runs import here
folder = here("", "tiny")
file = folder / "metrics.jsonl"
rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
bar = progress(total=steps, initial=len(rows), desc="tiny", unit="step")
for step in range(len(rows), steps):
    if not (folder / "go").exists(): time.sleep(pause)
    assert not file.exists() or len(file.read_text().splitlines()) == step, "another process writes here"
    rows.append({"step": step, "value": (rows[-1]["value"] if rows else x) * 3 % 1009})
    write_atomic(file, "".join(json.dumps(row) + "\\n" for row in rows))
    bar.set_postfix_str(f"value {rows[-1]['value']}")
    bar.update()
bar.close()"""
FAIL = """if fail == "error": raise ValueError("asked to fail\\nin two lines")
if fail == "die": os.kill(os.getpid(), signal.SIGKILL)
if fail == "disk": raise OSError(28, "No space left on device", "a-file")"""
SUMMARY = ('write_json(folder / "summary.json", {"x": x, "value": rows[-1]["value"], "threads": '
           'os.environ.get("OMP_NUM_THREADS")})')


@pytest.fixture
def tiny(tmp_path):
    "A run notebook that imports no torch, and goes on where it was cut off."
    cells = [new_markdown_cell("# Tiny"), new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             *map(new_code_cell, (WORK, FAIL, SUMMARY))]
    nbformat.write(new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "tiny.ipynb")
    return tmp_path / "tiny.ipynb"


def command(*words): return [sys.executable, "-m", "dmp_wb", "run", *map(str, words)]


def dmp_wb_run(*words, **changes):
    return subprocess.run(command(*words), capture_output=True, text=True, env={**os.environ, **changes})


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


# ---- what is to be run

def test_a_grid(tiny):
    planned = plan(tiny, {"steps": 7}, {"x": [1, 2.5], "fail": ["", "a b/c"]})
    assert [p.name for p in planned] == ["x=1,fail=", "x=1,fail=a_b_c", "x=2.5,fail=", "x=2.5,fail=a_b_c"]
    assert planned[-1].parameters == {"steps": 7, "x": 2.5, "fail": "a b/c"}
    assert [p.name for p in plan(tiny, {"x": 3})] == ["."]                       # a single run is the folder itself
    # what does not vary is not in the name
    assert [p.name for p in plan(tiny, None, {"x": [3], "steps": [1, 2]})] == ["steps=1", "steps=2"]


def test_keys_of_an_experiment_become_overrides():
    first, second = plan("patch", {"train.steps": 5, "overrides": "seed=1"}, {"optim.lr": [1e-4, 2e-4]})
    assert (first.name, second.name) == ("lr=0.0001", "lr=0.0002")
    assert first.parameters == {"overrides": ["seed=1", "train.steps=5", "optim.lr=0.0001"]}
    assert plan("patch", {"seed": 3})[0].parameters == {"overrides": ["seed=3"]}
    clash = plan("pretrain", None, {"train.steps": [1, 2], "train.sample_steps": [1, 2]})
    assert clash[0].name == "steps=1,sample_steps=1"
    assert plan("patch", None,
                {"patch.num_prompts": [8, 16], "train.compile": [True, False]})[0].parameters["overrides"][-2:] == [
                    "patch.num_prompts=8", "train.compile=true"]


def test_a_file_of_runs(tiny, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(f"notebook: {tiny}\nparameters: {{steps: 2}}\ngrid: {{x: [1, 2e-3]}}\nruns:\n- name: good\n- name: "
                    f"group/bad\n  parameters: {{fail: error, steps: 4}}\n")
    given = read_sweep(file)
    planned = plan(given["notebook"], given["parameters"], given["grid"], given["runs"])
    assert [p.name for p in planned] == ["good,x=1", "good,x=0.002", "group/bad,x=1", "group/bad,x=0.002"]
    assert planned[3].parameters == {"steps": 4, "fail": "error", "x": 0.002}
    unnamed = plan(tiny, None, None, [{"parameters": {"x": 1}}, {"parameters": {"x": 2}}])
    assert [p.name for p in unnamed] == ["001", "002"]


@pytest.mark.parametrize("arguments,message", [
    (("patsh",), "unknown notebook 'patsh': did you mean 'patch'"),
    (("nbs/runs/none.ipynb",), "no notebook nbs/runs/none.ipynb"),
    (("gates", {"timestep": 3}), "unknown parameter of notebook gates 'timestep': did you mean 'timesteps'"),
    (("patch", {"optim.lrr": 3}), "unknown parameter of notebook patch 'optim.lrr': did you mean 'optim.lr'"),
    (("patch", {"optim.lr": "fast"}), "optim.lr is 'fast'"),
    (("patch", {"run": "here"}), "each run of a batch has a folder of its own"),
    (("tiny", None, {"x": []}), "the grid of x is []: expected at least one value"),
    (("tiny", None, {"x": [1, 2, 1]}), "the grid of x has 1 more than once"),
    (("tiny", {"x": 1}, {"x": [1, 2]}), "parameter x is given for every run, and in the grid"),
    (("tiny", None, None, []), "the list of runs is empty"),
    (("tiny", None, None, [{"name": "../x"}]),
     "the name of run 1 of the list is '../x': expected a folder name that stays inside"),
    (("tiny", None, None, [{"name": "/x"}]), "expected a folder name that stays inside"),
    (("tiny", None, None, [{"name": "a"}, {"name": "a", "parameters": {"x": 2}}]), "two runs are called 'a'"),
    (("tiny", None, None, [{"name": "a"}, {"name": "b"}]),
     "runs 'a' and 'b' are the same notebook with the same parameters"),
    (("tiny", None, None, [{"nam": "a"}]), "unknown key 'nam': did you mean 'name'"),
    (("tiny", None, None, ["a"]), "run 1 of the list is 'a'"),
    (("tiny", None, {"x": [1, 2]}, [{"parameters": {"x": 9}}]),
     "parameter x is given for run 1 of the list, and in the grid"),
    ((3,), "notebook is 3: expected a path"),
    (("tiny", None, None, [{"notebook": ["tiny"]}]), "notebook is ['tiny']: expected a path"),
    (("tiny", {1: 2}), "parameters has the key 1: expected text"),
    (("tiny", None, {1: [2, 3]}), "grid has the key 1: expected text"),
    (("tiny", {"x": {1, 2}}), "parameters: x is {1, 2}: expected text, a number"),
    (("tiny", None, {"x": [1, 1j]}), "grid: x is [1, 1j]: expected text, a number"),
    (("tiny", None, None, [{"parameters": {"x": b"1"}}]), "run 1 of the list: parameters: x is b'1': expected text"),
    (("tiny", ["x"]), "parameters is ['x']: expected keys with values"),
])
def test_bad_plans(tiny, arguments, message):
    with pytest.raises(BadInput) as e: plan(*(tiny if a == "tiny" else a for a in arguments))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_notebooks_that_cannot_be_run(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1")],
                                metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}),
                   tmp_path / "plain.ipynb")
    with pytest.raises(BadInput, match="plain.ipynb has no cell tagged 'parameters'"): plan(tmp_path / "plain.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(BadInput, match="broken.ipynb is not a notebook"): plan(tmp_path / "broken.ipynb")


@pytest.mark.parametrize("text,message", [
    ("notebok: tiny", "unknown key 'notebok': did you mean 'notebook'"), ("grid: {}", "grid is empty"),
    ("runs: []", "runs is empty"),
    ("grid: [1]", "grid is [1]: expected keys with lists"), ("- 1", "not a mapping"), ("a: [", "not valid YAML"),
])
def test_bad_files(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(BadInput) as e: read_sweep(tmp_path / "s.yaml")
    assert message in str(e.value) and str(tmp_path / "s.yaml") in str(e.value)


def test_the_command_line(monkeypatch, tiny):
    from dmp_wb import cli
    got = []
    monkeypatch.setattr(batch_sweep, "sweep", lambda *a, **k: got.append((a, k)) or Sweep(tiny.parent, []))
    invoke = lambda *words: CliRunner().invoke(cli.app, ["run", *words])
    assert invoke("tiny", "-p", "x", "1", "-2", "3e-4", "--jobs", "2", "-p", "fail", "a b", "--cluster", "slurm",
                  "--partition", "gpu", "--slurm", "mem=8GB", "--timeout-min", "5").exit_code == 0
    arguments, options = got[0]
    assert (arguments == ("tiny", {"fail": "a b"}, {"x": [1, -2, 3e-4]}, None, None, None, None, 2, "slurm", False)
            and options == {"partition": "gpu", "mem": "8GB", "timeout_min": 5})
    for words, message in ((("tiny", "-p", "x"), "-p x has no value"), ((), "no notebook is named"),
                           (("tiny", "-p", "x", "1", "-p", "x", "2"), "parameter x is given more than once"),
                           (("tiny", "-p"), "-p has no key")):
        assert message in str(invoke(*words).exception)


def test_a_default_that_is_no_value(tiny):
    nb = nbformat.read(tiny, 4)
    nb.cells[1].source += "\nodd = {[]: 1}"
    nbformat.write(nb, tiny)
    assert batch_plan.parameters_of(tiny)["odd"] is None


def test_a_ticket_is_looked_at_under_the_lock(tmp_path, tiny):
    "A worker of a sweep that was killed must leave alone what its successor has written anew."
    batch_state.write_state(tmp_path / "r", batch_state.RunState(str(tiny), ticket="new"))
    assert (execute.execute_run(tmp_path / "r", tiny, "1", ticket="old") == ""
            and read_state(tmp_path / "r") == batch_state.RunState(str(tiny), ticket="new"))


def test_a_worker_that_is_stopped_while_it_gets_ready(tmp_path, tiny, monkeypatch):
    batch_state.write_state(tmp_path / "r", batch_state.RunState(str(tiny), ticket="t"))
    before = signal.getsignal(signal.SIGTERM)
    worker = batch_worker.Worker(str(tmp_path), [("r", str(tiny))], "t", None)
    monkeypatch.setattr(batch_worker, "job_id", lambda: "7")
    monkeypatch.setattr(batch_worker, "queue_again", lambda job: False)
    try:
        monkeypatch.setattr(batch_worker, "warm", lambda notebook: os.kill(os.getpid(), signal.SIGTERM))
        assert worker() == {} and not (tmp_path / "r" / "log.txt").exists()
        fork = os.fork

        def fork_and_stop():
            pid = fork()
            if pid == 0: os.kill(os.getpid(), signal.SIGTERM)   # before the child has a handler of its own
            return pid
        monkeypatch.setattr(batch_worker, "warm", lambda notebook: None)
        monkeypatch.setattr(batch_worker.os, "fork", fork_and_stop)
        assert worker() == {} and read_state(tmp_path / "r").status == WAITING
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally: signal.signal(signal.SIGTERM, before)


def test_a_run_that_is_killed_before_it_began_has_failed_and_its_worker_goes_on(tmp_path, tiny, monkeypatch):
    for name in "ab": batch_state.write_state(tmp_path / name, batch_state.RunState(str(tiny), ticket="t"))
    before, fork = signal.getsignal(signal.SIGTERM), os.fork

    def fork_and_die():
        pid = fork()
        if pid == 0: os.kill(os.getpid(), signal.SIGKILL)
        return pid
    monkeypatch.setattr(batch_worker, "job_id", lambda: "7")
    monkeypatch.setattr(batch_worker, "warm", lambda notebook: None)
    monkeypatch.setattr(batch_worker.os, "fork", fork_and_die)
    try:
        assert batch_worker.Worker(str(tmp_path), [(n, str(tiny)) for n in "ab"], "t", None)() == {"a": FAILED,
                                                                                                   "b": FAILED}
    finally: signal.signal(signal.SIGTERM, before)
    assert (read_state(tmp_path / "a").error
            == "the process of the run ended by signal SIGKILL before the run began; look at log.txt")


def test_a_worker_whose_starter_died_takes_nothing(tmp_path, tiny, monkeypatch):
    batch_state.write_state(tmp_path / "r", batch_state.RunState(str(tiny), ticket="t"))
    monkeypatch.setattr(batch_worker, "job_id", lambda: "1")   # not the parent of this process
    monkeypatch.setattr(batch_worker, "die_with_parent", lambda: None)
    assert (batch_worker.Worker(str(tmp_path), [("r", str(tiny))], "t", process_identity())() == {}
            and read_state(tmp_path / "r").status == WAITING)


def test_a_worker_that_is_killed_before_it_takes_a_run_is_replaced(tiny, runs_folder):
    folder, killed = runs_folder / "t", []
    left = {".run.json.0a1b2c3d.tmp", "..progress.json.7.tmp"}   # of killed writes
    folder.mkdir(parents=True)
    for name in (*left, ".theirs.0a1b2c3d.tmp", ".run.json.tmp"): (folder / name).write_text("{")

    def kill_once():
        wait_for(
            lambda: [killed.append(p.kill()) for p in left_behind(folder) if "submitit.core._submit" in p.cmdline()])
    thread = threading.Thread(target=kill_once)
    thread.start()
    done = sweep(tiny, {"x": 5}, name="t")
    thread.join()
    assert killed and done.finished and read_json(folder / "summary.json")["value"] == 135
    assert ({p.name for p in folder.rglob("*.tmp")} == {".theirs.0a1b2c3d.tmp", ".run.json.tmp"}
            and not [*folder.rglob("*.pkl"), *folder.rglob(".progress.json")])


@pytest.mark.parametrize("changes", [{"attempts": "x"}, {"status": "done"}, {"seconds": []}, {"parameters": 3},
                                     {"cell": "1"}, {"ticket": None}, {"notebook": 3}])
def test_the_state_of_a_run_may_be_anybodys(tmp_path, tiny, changes):
    (tmp_path / "run.json").write_text(json.dumps({**dataclasses.asdict(batch_state.RunState(str(tiny))), **changes}))
    with pytest.raises(BadInput, match=f"run.json: {next(iter(changes))} is .*: expected what"): read_state(tmp_path)
    (tmp_path / ".progress.json").write_text(json.dumps({"cell": 1, "bar": {"n": "x", "total": changes}}))
    assert view.line_of(tmp_path, batch_state.RunState("x", status=batch_state.RUNNING)) == "cell 1/None"


def test_a_job_that_passes_over_the_first_sigterm():
    code = ("import signal, sys, time\nasked = []\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit() if asked else "
            "asked.append(1))\nprint(flush=True)\nwhile True: time.sleep(.05)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline()

    class Job:
        job_id = str(child.pid)
        def done(self): return child.poll() is not None
    try:
        jobs.end_jobs([Job()])
        assert child.returncode == 0
    finally: child.kill()


def test_gpus_are_shared_out():
    assert ([gpu_share(None, 4, i, 2) for i in (0, 1)] == ["0,2", "1,3"]
            and [gpu_share("5,7", 8, i, 3) for i in (0, 1, 2)] == ["5", "7", "5"])
    assert (gpu_share(None, 1, 1, 2) is None and gpu_share("", 8, 1, 2) == "" and gpu_share(None, 8, 0, 1) is None
            and gpu_share("3", 8, 1, 2) == "3")


def test_places_that_are_not_there(tiny, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="cluster is slurm, but there is no sbatch here"): sweep(tiny, cluster="slurm")
    with pytest.raises(BadInput, match="unknown cluster 'slrum': did you mean 'slurm'"): sweep(tiny, cluster="slrum")
    with pytest.raises(BadInput, match="partition is an option of a cluster"): sweep(tiny, partition="gpu")
    with pytest.raises(BadInput, match="the name of the sweep is '../up'"): sweep(tiny, name="../up")
    with pytest.raises(BadInput, match="jobs is 0"): sweep(tiny, jobs=0)


def test_a_disk_without_space_is_told(tiny, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("dmp_wb.batch.sweep.write_state", full)
    with pytest.raises(BadInput, match="no space left on the disk.*nothing that is finished is lost"): sweep(tiny)


def test_what_a_run_says():
    state = batch_state.RunState("x.ipynb")
    say = lambda **k: view.line_of(batch_state.Path("/nowhere"), dataclasses.replace(state, **k))
    assert (say(), say(status=FINISHED, seconds=3.4), say(status=STOPPED)) == ("waiting", "finished in 3 s",
                                                                               "stopped; run again to go on")
    assert say(status=FAILED, cell=3, error="ValueError: no") == "failed in cell 3: ValueError: no"
    assert engine.death(-9, "log.txt").startswith(
        "the kernel died: by signal SIGKILL, most often because memory ran out; what it wrote last is in log.txt")


# ---- runs that are executed

def test_failing_runs_do_not_stop_the_others(tiny, runs_folder):
    "The whole story once: a grid, two at a time; a failing cell and a dying kernel; then once more."
    words = (tiny, "-p", "x", 1, 2, "-p", "fail", "", "error", "die", "--name", "t", "--jobs", 2)
    done = dmp_wb_run(*words, OMP_NUM_THREADS="")
    folder = runs_folder / "t"
    states = {f.parent.name: read_state(f.parent) for f in folder.glob("*/run.json")}
    assert done.returncode == 1 and {n: s.status for n, s in states.items()} == {
        f"x={x},{f}": s for x in (1, 2) for f, s in (("fail=", FINISHED), ("fail=error", FAILED), ("fail=die", FAILED))}
    assert "error: x=1,fail=error failed in cell 4: ValueError: asked to fail in two lines" in done.stderr
    assert ("error: x=2,fail=die failed in cell 4: the kernel died: by signal SIGKILL, most often because memory ran "
            "out; what it wrote last is in log.txt" in done.stderr)
    assert re.search(r"t: 2 finished, 4 failed", done.stderr) and "Traceback" not in done.stderr
    for name in states:
        page = (folder / name / "run.html").read_text()
        assert {"run.ipynb", "run.json", "metrics.jsonl", "log.txt"} <= {p.name for p in (folder / name).iterdir()}
        if "error" in name: assert "asked to fail" in page and "Traceback" in page
        if "die" in name: assert "the kernel died" in page
    assert read_json(folder / "x=2,fail=" / "summary.json") == {"x": 2, "value": 54, "threads": ""}
    injected = next(c for c in nbformat.read(folder / "x=2,fail=die" / "run.ipynb", 4).cells
                    if "injected-parameters" in c.metadata.get("tags", []))
    assert injected.source.strip() == '# Parameters\nx = 2\nfail = "die"'
    assert not left_behind(folder)

    before = {n: (folder / n / "run.ipynb").stat().st_mtime_ns for n in states}
    again = dmp_wb_run(*words)
    assert again.returncode == 1 and "2 finished, 4 failed" in again.stderr
    for n, s in states.items():
        assert read_state(folder / n).attempts == (1 if s.status == FINISHED else 2)
        assert ((folder / n / "run.ipynb").stat().st_mtime_ns == before[n]) == (s.status == FINISHED)

    refused = dmp_wb_run(*words[:-4], "--name", "t", "-p", "steps", 9)
    assert (refused.returncode == 2 and "was made with other parameters (steps was 'not given', is 9)" in refused.stderr
            and refused.stderr.count("\n") == 1)
    nb = nbformat.read(tiny, 4)
    nb.cells[3].source = "pass"   # mended
    nbformat.write(nb, tiny)
    refused = dmp_wb_run(*words)
    assert (refused.returncode == 2
            and "2 finished runs were made with another version of the notebook" in refused.stderr)
    mended = dmp_wb_run(*words, "--keep-finished")
    assert mended.returncode == 0 and "t: 6 finished" in mended.stderr


def test_cores_are_shared_out(tiny, monkeypatch, runs_folder):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    done = sweep(tiny, {"x": 5}, jobs=2, name="five")
    assert (done.finished and read_json(runs_folder / "five" / "summary.json") == {"x": 5, "value": 135, "threads": "3"}
            and "OMP_NUM_THREADS" not in os.environ)


def test_stopped_and_resumed(tiny, runs_folder):
    "By Ctrl-C, which reaches every process of a terminal, and by SIGTERM, which reaches the sweep; then to the end."
    words, folder = ((tiny, "-p", "x", 1, 2, 3, "-p", "steps", 90, "-p", "pause", 0.5, "--jobs", 2, "--name", "t"),
                     runs_folder / "t")
    lines = (lambda: len((folder / "x=2" / "metrics.jsonl").read_text().splitlines())
             if (folder / "x=2" / "metrics.jsonl").exists() else 0)
    before = 0
    for stop in (lambda p: os.killpg(p.pid, signal.SIGINT), lambda p: p.send_signal(signal.SIGTERM)):
        process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, start_new_session=True)
        # step, rate and ETA while the cell runs
        wait_for(lambda before=before: lines() > before
                 and "step/s" in view.line_of(folder / "x=2", read_state(folder / "x=2")))
        stop(process)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and re.search(
            r"t: .*2 stopped, 1 waiting\nstopped; run the same again to go on", error)
        assert ({read_state(folder / f"x={i}").status for i in (1, 2)} == {STOPPED}
                and read_state(folder / "x=3").status == WAITING)
        wait_for(lambda: not left_behind(folder), 10)
        before = lines()
        assert 0 < before < 90
    for i in (1, 2, 3): (folder / f"x={i}" / "go").touch()   # as fast as it can
    again = dmp_wb_run(*words)
    assert again.returncode == 0 and "t: 3 finished" in again.stderr
    assert (read_json(folder / "x=1" / "summary.json")["value"] == pow(3, 90, 1009)
            and read_state(folder / "x=1").attempts == 3)


def test_two_sweeps_in_one_folder(tiny, runs_folder):
    words, folder = (tiny, "-p", "steps", 400, "-p", "pause", 0.05, "--name", "t"), runs_folder / "t"
    first = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    second = dmp_wb_run(*words)
    assert second.returncode == 2 and re.fullmatch(
        r"error: sweep .* is being written by process \d+ on .*: expected to be the only one\n", second.stderr)

    worker = next(p for p in left_behind(folder) if "submitit.core._submit" in p.cmdline() and p.parent().pid != p.pid
                  and "_local" in " ".join(p.parent().cmdline()))
    worker.kill()   # the process that executes the run: the sweep names it, and nothing is left
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 1 and re.search(r"error: t failed: its job \d+ ended without a word", error)
    wait_for(lambda: not left_behind(folder), 10)


def test_killed_sweeps(tiny, tmp_path):
    "A short drill; tools/drills/kill_a_sweep.py is the long one, with real trainings."
    hits, wrong = drill([str(tiny), "-p", "x", "1", "2", "3", "-p", "steps", "30", "-p", "pause", "0.05"], 2,
                        tmp_path / "drill", seed=1)
    assert not wrong and len(hits) == 2


def test_a_kernel_of_another_environment(tiny, tmp_path, monkeypatch, runs_folder):
    "A kernel that is not this Python's own cannot be forked: it is started, and dies with the sweep."
    spec = tmp_path / "jupyter" / "kernels" / "other"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": [sys.executable, "-X", "utf8", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                    "display_name": "other", "language": "python"}))
    nb = nbformat.read(tiny, 4)
    nb.metadata.kernelspec.name = "other"
    nbformat.write(nb, tiny)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    process = subprocess.Popen(command(tiny, "-p", "steps", 400, "-p", "pause", 0.05, "--name", "t"),
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: (runs_folder / "t" / "metrics.jsonl").exists())
    kernel, = (p for p in psutil.Process(process.pid).children(recursive=True)
               if p.status() != psutil.STATUS_ZOMBIE and "utf8" in p.cmdline())
    process.kill()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 20)
    done = dmp_wb_run(tiny, "-p", "steps", 400, "-p", "pause", 0.0, "--name", "t")
    assert done.returncode == 2 and "pause was 0.05, is 0.0" in done.stderr
    nb.metadata.kernelspec.name = "none"
    nbformat.write(nb, tiny)
    done = dmp_wb_run(tiny, "--name", "u")
    assert done.returncode == 1 and "error: u failed: NoSuchKernel: No such kernel named none" in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90k", "tmpfs", tmp_path / "disk"],
                                      capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_disk_that_fills_up(tiny, small_disk):
    done = dmp_wb_run(tiny, "-p", "x", *range(1, 6), "--folder", small_disk / "t")
    assert (done.returncode == 2 and "no space left on the disk" in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    again = dmp_wb_run(tiny, "-p", "x", *range(1, 6), "--folder", small_disk / "t")
    assert again.returncode == 0 and "5 finished" in again.stderr


def test_training_is_resumed_exactly(runs_folder):
    "A real training run, stopped in the middle by Ctrl-C."
    words = ("pretrain", *(w for k, v in SMALL.items() for w in ("-p", k, v)))
    whole = dmp_wb_run(*words, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command(*words, "--name", "broken"), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((runs_folder / "broken").glob("checkpoints/step-*")))
    process.send_signal(signal.SIGINT)
    assert "1 stopped" in process.communicate(timeout=60)[1]
    assert not (runs_folder / "broken" / "summary.json").exists()
    assert dmp_wb_run(*words, "--name", "broken").returncode == 0
    assert figures(runs_folder / "broken") == figures(runs_folder / "whole")
    assert {"config.yaml", "run.ipynb", "run.html", "run.json", "metrics.jsonl", "summary.json", "checkpoints",
            "figures", "model"} <= {p.name for p in (runs_folder / "broken").iterdir()}


def test_a_long_list_fits_the_terminal(tmp_path):
    names = [f"x={i}" for i in range(30)]
    states = {n: batch_state.RunState("x.ipynb", status=FINISHED if i < 20 else WAITING, seconds=1.0)
              for i, n in enumerate(names)}
    states["x=21"] = dataclasses.replace(states["x=21"], status=batch_state.RUNNING)
    for n, s in states.items(): batch_state.write_state(tmp_path / n, s)
    lines = View(Sweep(tmp_path, names)).lines(states, 10)
    assert (len(lines) == 11 and [t for _, t in lines if t.startswith("x=21 ")] and lines[-2][1] == "… and 21 more"
            and "20 finished, 1 running, 9 waiting" in lines[-1][1])


@pytest.mark.parametrize("given,meant", [("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"),
                                         ("max_steps", "train.steps")])
def test_keys_that_other_trainers_call_otherwise_are_hinted_at_in_batches_too(given, meant):
    with pytest.raises(BadInput, match=f"did you mean '{meant}'"):
        batch_plan.with_overrides(batch_plan.find_notebook("pretrain"), {given: 1}, {"overrides": ""})
