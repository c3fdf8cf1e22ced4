"What a job asks for, and a Slurm that is not there: without one."
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dmp_wb.batch import slurm as batch_slurm
from dmp_wb.batch import jobs
from dmp_wb.batch import sweep
from dmp_wb.batch import worker
from dmp_wb.core.errors import BadInput
from dmp_wb.core.files import read_json, write_json
from dmp_wb.batch.state import read_state, RUNNING, RunState, STOPPED, write_state
from dmp_wb.batch.slurm import ending, job_states, JobWatch, notice, slurm_executor


@pytest.fixture
def a_cluster(monkeypatch): monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")


def script(tmp_path, **options):
    return slurm_executor(tmp_path, "sweep", 3, options)._executor._make_submission_file_text("python -m x", "1")


def test_options_reach_sbatch(a_cluster, tmp_path):
    text = script(tmp_path, partition="gpu", account="lab", qos="high", constraint="a100", timeout_min=240,
                  gpus_per_node=2, cpus_per_task=16, mem_gb=1.5, setup="module load cuda", exclude=None)
    for line in ("--partition=gpu", "--account=lab", "--qos=high", "--constraint=a100", "--time=240",
                 "--gpus-per-node=2", "--cpus-per-task=16", "--mem=1536MB", "--signal=USR2@120", "--job-name=sweep"):
        assert f"#SBATCH {line}\n" in text, line
    assert "module load cuda\n" in text and "--exclude" not in text
    # srun does not take it over
    assert "--cpus-per-task=16 " in text.split("# command")[1]
    assert "#SBATCH --time=60\n" in script(tmp_path) and "#SBATCH --signal=USR2@45\n" in script(tmp_path, time=3)
    assert notice({"timeout_min": 3}) == 45 and notice({}) == 120 and notice({"signal_delay_s": 7}) == 7
    assert notice({"timeout_min": None, "time": None}) == 120 and notice({"timeout_min": None, "time": 2}) == 30


def test_a_run_over_several_nodes_is_a_task_on_each(a_cluster, tmp_path):
    text = script(tmp_path, nodes=2, gpus_per_node=4, srun_args="--mpi=none")
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4"): assert f"#SBATCH {line}\n" in text, line
    assert "--mpi=none --kill-on-bad-exit=1" in text.split("# command")[1]
    assert "--kill-on-bad-exit" not in script(tmp_path)


class Launched:
    "In the place of what a worker launches."
    def __init__(self, words, env): self.words, self.status, self.asked = words, None, 0
    def poll(self): return self.status
    def terminate(self): self.asked, self.status = self.asked + 1, 0


def test_a_worker_on_another_node_launches_what_the_first_launches(tmp_path, monkeypatch):
    launched, turns = [], iter(range(1000))
    monkeypatch.setattr(worker.subprocess, "Popen", lambda *a, **b: launched.append(Launched(*a, **b)) or launched[-1])
    file = tmp_path / "call.json"

    def sleep(seconds):
        turn = next(turns)
        if turn == 1: write_json(file, {"id": "a"})
        if turn == 4: write_json(file, {"id": "b"})   # before the first is over: in turn
        if turn == 6:
            assert len(launched) == 1
            launched[0].status = 0
        if turn == 9: write_json(file, {"over": True})
        assert turn < 20
    monkeypatch.setattr(worker.time, "sleep", sleep)
    worker.follow_calls(file, 3, lambda: False, 5.0)
    assert len(launched) == 2 and launched[0].words[-2:] == [str(file), "3"] and launched[1].asked == 1
    stopping = iter([False, False, True, True])
    file.unlink()
    worker.follow_calls(file, 3, lambda: next(stopping), 5.0)   # told to stop before there is anything


def test_which_node_a_worker_is_on(tmp_path, monkeypatch):
    for name, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "1"}.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker, "job_id", lambda: "17_0")
    assert worker.node_rank() == 0
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert worker.node_rank() == 1 and worker.calls_of(tmp_path).name == "launch-17_0-0.json"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert worker.calls_of(tmp_path) == tmp_path / ".sweep" / "jobs" / "launch-17_0-2.json"


@pytest.mark.parametrize("options,message", [
    ({"partitoin": "gpu"}, "unknown option of slurm 'partitoin': did you mean 'partition'"),
    ({"timeout_min": 0}, "timeout_min is 0: expected at least 1"),
    ({"timeout_min": 5, "time": 6}, "timeout_min and time are given"),
    ({"gpus_per_node": "two"}, "gpus_per_node is 'two': expected a whole number"),
    ({"ntasks_per_node": 4}, "ntasks_per_node is 4: expected 1, a run is one task on each of its nodes.*num_processes"),
])
def test_options_that_cannot_be(a_cluster, tmp_path, options, message):
    with pytest.raises(BadInput, match=message): slurm_executor(tmp_path, "sweep", 1, options)


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="there is no sbatch here"): slurm_executor(tmp_path, "sweep", 1, {})
    assert job_states(["1"]) == {"1": "UNKNOWN"} and job_states([]) == {}


def test_states_of_jobs(monkeypatch):
    asked = []

    def squeue(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, *answer)
    monkeypatch.setattr(batch_slurm.subprocess, "run", squeue)
    answer = (0, "7_0|RUNNING\n7_1|COMPLETING\n", "")
    assert (job_states(["7_1", "7_0", "7_2", "7_0"]) == {"7_0": "RUNNING", "7_1": "COMPLETING", "7_2": "GONE"}
            and asked == ["--jobs=7_0,7_1,7_2"])
    answer = (1, "", "slurm_load_jobs error: Invalid job id specified")
    assert job_states(["7"]) == {"7": "GONE"}
    answer = (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")   # it may come back
    assert job_states(["7"]) == {"7": "UNKNOWN"}
    watch = JobWatch(every=3600)
    answer = (0, "7|RUNNING\n8|RUNNING\n", "")
    assert watch(["7", "8"]) == {"7": "RUNNING", "8": "RUNNING"}
    answer = (0, "7|COMPLETED\n8|RUNNING\n", "")
    before = len(asked)
    # it does not ask all the time
    assert watch(["8"]) == {"8": "RUNNING"} and len(asked) == before
    assert JobWatch(every=0)(["7"]) == {"7": "COMPLETED"}


@pytest.mark.parametrize("seconds", [5, 10, 120])
def test_a_notebook_gets_time_to_stop(tmp_path, monkeypatch, seconds):
    nbformat.write(new_notebook(cells=[new_code_cell("x = 1", metadata={"tags": ["parameters"]})]),
                   tmp_path / "tiny.ipynb")

    class Submitted(Exception): pass
    def submit(executor, workers, threads): raise Submitted(workers[0].grace)
    monkeypatch.setattr(sweep, "make_executor", lambda *_: None)
    monkeypatch.setattr(sweep, "submit", submit)
    with pytest.raises(Submitted) as e:
        sweep.sweep(tmp_path / "tiny.ipynb", folder=tmp_path / "t", cluster="slurm", signal_delay_s=seconds,
                    timeout_min=None)
    assert 0 < e.value.args[0] < seconds


def job(number): return SimpleNamespace(job_id=number, paths=SimpleNamespace(stderr=Path("log.err")))


def test_which_job_has_which_run_is_kept(tmp_path):
    assert jobs.note_jobs(tmp_path, {"a": job("1"), "b": job("2")}) == {"1": "a", "2": "b"}
    assert jobs.note_jobs(tmp_path, {"b": job("3"), "c": job("4")}) == {"3": "b", "4": "c"}
    assert read_json(tmp_path / ".sweep" / "slurm.json") == {"a": "1", "b": "3", "c": "4"}


def test_the_end_of_a_job_says_nothing_of_another(tmp_path):
    write_state(tmp_path / "a", RunState("x.ipynb", status=RUNNING, job="2"))
    jobs.bury_job(tmp_path, "a", job("1"), "FAILED")
    assert read_state(tmp_path / "a").status == RUNNING
    jobs.bury_job(tmp_path, "a", job("2"), "PREEMPTED")
    assert read_state(tmp_path / "a").status == STOPPED and "PREEMPTED" in batch_slurm.OVER


def test_why_a_job_ended(tmp_path):
    log = tmp_path / "log.err"
    assert ending("7_0", "CANCELLED", log) == (True, "its job 7_0 was cancelled") and ending("7", "NODE_FAIL", log)[0]
    assert ending("7", "OUT_OF_MEMORY", log) == (
        False, "its job 7 needed more memory than it had asked for; give it more with --mem-gb")
    log.write_text("Traceback\nModuleNotFoundError: No module named 'dmp_wb'\n\n")
    resumable, why = ending("7", "FAILED", log)
    assert not resumable and why.startswith("its job 7 ended without a word (failed): ModuleNotFoundError: No module "
                                            "named 'dmp_wb'; look at ") and why.endswith("log.err")
