"Training launched from a notebook's process: two processes by gloo, interrupted, failing, left alone."
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from accelerate.commands.config.config_args import ClusterConfig

import dmp_wb as wb
from dmp_wb.training import launching as training_launching
from dmp_wb.store.checkpoints import newest_checkpoint
from dmp_wb.store.run import Run
from dmp_wb.core.errors import BadInput
from dmp_wb.core.processes import process_alive, process_identity
from dmp_wb.training.launching import launch, launch_error

SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.log_every=1", "train.checkpoint_every=1000"]
LONG = [*SMALL, "train.steps=100000"]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch): monkeypatch.setattr(os, "cpu_count", lambda: 2)


def started(run, step=3, limit=300):
    "Wait until a run has taken some steps."
    end = time.monotonic() + limit
    while not any(row >= step for row in run.metrics().get("step", [])):
        assert time.monotonic() < end, (run.folder / "launch.log").read_text()
        time.sleep(0.1)


def family(process): return [process_identity(p.pid) for p in process.children(recursive=True)]


def ears(processes): return [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"]


def gone(processes, limit=120):
    end = time.monotonic() + limit
    while left := [p for p in processes if process_alive(p)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_two_processes_give_the_run_of_one(tmp_path, runs_folder, capfd, monkeypatch):
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "DiTBlock", "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="FSDP", mixed_precision="no", use_cpu=False,
                  debug=False, num_processes=2, fsdp_config=fsdp).to_yaml_file(tmp_path / "fsdp.yaml")
    # as srun leaves them
    for name, value in {"PMI_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    # which says how many
    run = wb.launch("digits-quick", [*SMALL, "name=two", "train.steps=12"], config_file=tmp_path / "fsdp.yaml")
    out, err = capfd.readouterr()
    assert (run.finished and run.folder == runs_folder / "two" and "16 images a step on 2 × cpu" in out
            and f"finished: {run.folder}" in out)
    assert "two  12/12 100%" in err and "loss" in err                     # the bar of the child, here
    assert "finished" in (run.folder / "launch.log").read_text() and not list(run.folder.glob("*.tmp"))
    for name in ("PMI_SIZE", "RANK", "WORLD_SIZE", "MASTER_PORT"): monkeypatch.delenv(name)
    one = wb.train("digits-quick", [*SMALL, "name=one", "train.steps=12"])
    assert run.metrics()["loss"] == pytest.approx(one.metrics()["loss"], rel=1e-4)
    # finished: nothing is started
    assert launch("digits-quick", [*SMALL, "name=two", "train.steps=12"], num_processes=2).folder == run.folder
    assert "nothing to do" in capfd.readouterr().out


def test_an_interrupted_cell_leaves_a_checkpoint_and_no_process(runs_folder, capfd):
    run = Run(runs_folder / "long")
    listening, seen, others = [], [], set(family(psutil.Process()))   # a worker of pytest has children of its own

    def interrupt():
        started(run)
        listening.extend(ears(psutil.Process().children(recursive=True)))
        seen.extend(p for p in family(psutil.Process()) if p not in others)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt): launch("digits-quick", [*LONG, "name=long"], num_processes=2)
    assert listening and {address for address in listening} == {"127.0.0.1"}   # nobody else's machine can reach them
    # accelerate, torchrun or its like, two that train
    assert len(seen) >= 3 and not any(process_alive(p) for p in seen)
    step = json.loads((newest_checkpoint(run.folder) / "state.json").read_text())["step"]
    assert not run.finished and f"step-{step:07d}: launch again to go on" in capfd.readouterr().out

    def stop():
        started(run, step + 3)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    again = launch("digits-quick", [*LONG, "name=long"], num_processes=2)   # as wb.train: SIGTERM ends it, unfinished
    assert not again.finished and f"resumed at step {step}" in capfd.readouterr().out
    steps = run.metrics()["step"]
    assert steps == list(range(1, len(steps) + 1)) and newest_checkpoint(run.folder).name == f"step-{steps[-1]:07d}"


@pytest.mark.parametrize("how", ["notebook", "worker"])
def test_killed(how, tmp_path, runs_folder):
    """SIGKILL to the notebook's process: the training ends, with a checkpoint. To one that trains:
    an error that says so."""
    code = (f"import os; os.cpu_count = lambda: 2\nimport dmp_wb as wb\nwb.launch('digits-quick', {LONG!r} + "
            "['name=killed'], num_processes=2)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as parent:
        run = Run(runs_folder / "killed")
        started(run)
        children = family(psutil.Process(parent.pid))
        if how == "notebook":
            parent.kill()
            parent.communicate()
            assert len(children) >= 3
            gone(children)
            assert not run.finished and newest_checkpoint(run.folder) is not None
        else:
            next(p
                 for p in psutil.Process(parent.pid).children(recursive=True) if p.environ().get("RANK") == "1").kill()
            err = parent.communicate(timeout=300)[1]
            assert parent.returncode == 1
            last = err.strip().splitlines()[-1]
            assert last.startswith("RuntimeError: ") and str(run.folder / "launch.log") in last
            # whichever is noticed first
            assert "killed by SIGKILL, as happens where memory runs out" in last or "process 0 failed" in last
            gone(children)


def test_the_first_error_of_the_processes_is_told(runs_folder):
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+.*\(log: .*launch\.log\)"):
        launch("digits-quick", [*SMALL, "name=bad", "train.steps=50", "optim.lr=1e30"], num_processes=1)
    assert "Traceback" in (runs_folder / "bad" / "launch.log").read_text()


def test_what_an_error_says(tmp_path):
    log = tmp_path / "launch.log"
    log.write_text("before\n")
    start = log.stat().st_size

    def told(text="", *errors):
        log.write_text("before\n" + text)
        for old in tmp_path.glob("error-*"): old.unlink()
        for i, (when, kind, message) in enumerate(errors):
            (tmp_path / f"error-{i}.json").write_text(
                json.dumps({"time": when, "rank": i, "type": kind, "message": message, "traceback": ""}))
        e = launch_error(tmp_path, log, start, 1)
        return type(e), str(e).replace(f" (log: {log})", "")
    # the first, not the lowest
    assert told("", (2, "RuntimeError", "connection closed by peer"), (1, "BadInput", "no data")) == (BadInput,
                                                                                                      "no data")
    assert told("", (1, "OutOfMemoryError", "CUDA out of memory")) == (
        RuntimeError, "process 0 failed: OutOfMemoryError: CUDA out of memory")
    assert told("Signal 15 (SIGTERM) received\nRoot Cause\nSignal 9 (SIGKILL) received by PID 7\n") == (
        RuntimeError, "a process was killed by SIGKILL, as happens where memory runs out")
    assert told("subprocess.CalledProcessError: Command … died with <Signals.SIGSEGV: 11>.") == (
        RuntimeError, "a process was killed by SIGSEGV")
    assert told("ValueError: You need to use at least 2 processes\n=====\n") == (
        RuntimeError, "accelerate launch ended with status 1: ValueError: You need to use at least 2 processes")
    assert told() == (RuntimeError, "accelerate launch ended with status 1: nothing in the log")


def test_what_cannot_work_starts_nothing(tmp_path, runs_folder, monkeypatch):
    def never(*_, **__): raise AssertionError("a process was started")
    monkeypatch.setattr(training_launching.subprocess, "Popen", never)

    def refused(message, *arguments, **more):
        with pytest.raises(BadInput, match=message): launch(*arguments, **more)
    refused("unknown experiment 'digits-qick': did you mean 'digits-quick'", "digits-qick")
    refused("did you mean 'optim.lr'", "digits-quick", ["optim.lrr=1"])
    refused("num_processes is 3: expected at most 2, the CPU cores of this machine", "digits-quick", num_processes=3)
    refused("num_processes is 0: expected at least 1", "digits-quick", num_processes=0)
    refused("train.batch_size is 9: expected a multiple of 2 processes", "digits-quick", ["train.batch_size=9"],
            num_processes=2)
    refused("no file .*none.yaml", "digits-quick", config_file=tmp_path / "none.yaml")
    (tmp_path / "other.yaml").write_text("batch: [1")
    refused("other.yaml is not a config file of accelerate", "digits-quick", config_file=tmp_path / "other.yaml")
    config = dict(compute_environment="LOCAL_MACHINE", mixed_precision="no", use_cpu=True, debug=False)
    ClusterConfig(distributed_type="MULTI_CPU", num_processes=2, num_machines=2,
                  **config).to_yaml_file(tmp_path / "two.yaml")
    # a launch is on each of them
    refused("main_process_ip is not given: expected the address of machine 0", "digits-quick",
            config_file=tmp_path / "two.yaml")
    ClusterConfig(distributed_type="MULTI_CPU", num_processes=5, **config).to_yaml_file(tmp_path / "five.yaml")
    # the file says how many
    refused("num_processes is 5", "digits-quick", config_file=tmp_path / "five.yaml")
    refused("name is 'digits-dmp', which is a run that ships", "digits-dmp")
    with wb.store.checkpoints.run_lock(runs_folder / "taken"):
        refused("is being written by", "digits-quick", ["name=taken"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("one of 2 processes already", "digits-quick")
    assert not any(p.name != "taken" for p in runs_folder.iterdir())


def commanded(monkeypatch, *arguments, **more):
    "The command line and environment with which a launch would start."
    class Started(Exception): pass

    def start(command, env, **_): raise Started(command, env)
    with monkeypatch.context() as m, pytest.raises(Started) as e:
        m.setattr(training_launching.subprocess, "Popen", start)
        launch(*arguments, **more)
    return e.value.args


def test_a_config_file_of_one_process_does_not_make_one_of_several(tmp_path, runs_folder, monkeypatch):
    config = dict(compute_environment="LOCAL_MACHINE", mixed_precision="no", debug=False, num_processes=1,
                  num_machines=1, machine_rank=0)
    default = tmp_path / "accelerate" / "default_config.yaml"     # as HF_HOME has it
    default.parent.mkdir()
    monkeypatch.setattr(training_launching, "default_config_file", str(default))
    ClusterConfig(distributed_type="NO", use_cpu=False, **config).to_yaml_file(default)
    assert (training_launching.launch_processes(wb.load_experiment("digits-quick"), None, None) == 1
            and "--multi_gpu" not in commanded(monkeypatch, "digits-quick", num_processes=2)[0])
    monkeypatch.setattr(training_launching.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(training_launching.torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command, env = commanded(monkeypatch, "digits-quick", num_processes=4)
    assert ("--multi_gpu" in command and env["DMP_WB_PROCESSES"] == "4"
            and command[command.index("--num_processes") + 1] == "4")
    assert "--multi_gpu" not in commanded(monkeypatch, "digits-quick", num_processes=1)[0]
    ClusterConfig(distributed_type="FSDP", use_cpu=False, fsdp_config={"fsdp_version": 2},
                  **config).to_yaml_file(default)
    # which is several by itself
    assert "--multi_gpu" not in commanded(monkeypatch, "digits-quick", num_processes=4)[0]
    ClusterConfig(distributed_type="NO", use_cpu=True, **config).to_yaml_file(default)
    with pytest.raises(BadInput, match="num_processes is 4: expected at most 2, the CPU cores"):
        launch("digits-quick", num_processes=4)
    command, env = commanded(monkeypatch, "digits-quick", num_processes=2)
    assert env["CUDA_VISIBLE_DEVICES"] == "" and "--multi_gpu" not in command
    for ids, n, message in (("0,1", 4, "num_processes is 4: expected at most 2, the gpu_ids 0,1 of"),
                            (1, 2, "expected at most 1, the gpu_ids 1 of"), ("0,0", 2, "expected at most 1"),
                            ("2,7", 2, "gpu_ids is 2,7 in .*: expected numbers below 4")):
        ClusterConfig(distributed_type="MULTI_GPU", use_cpu=False, gpu_ids=ids, **config).to_yaml_file(default)
        with pytest.raises(BadInput, match=message): launch("digits-quick", num_processes=n)
    ClusterConfig(distributed_type="MULTI_GPU", use_cpu=False, gpu_ids="0, 3", **config).to_yaml_file(default)
    commanded(monkeypatch, "digits-quick", num_processes=2)


def test_fewer_processes_than_were_asked_for_are_an_error(runs_folder, monkeypatch):
    monkeypatch.setenv("DMP_WB_PROCESSES", "4")
    with pytest.raises(BadInput, match="num_processes is 4, but accelerate started 1: expected as many"):
        wb.train("digits-quick", [*SMALL, "train.steps=1"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(training_launching.torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(BadInput, match="4 processes were started on this machine, which shows them 2 GPUs"):
        wb.training.distributed.check_launch(cpu=False)


def test_accelerate_on_a_cpu_meets_on_loopback_and_leaves_no_file(tmp_path, runs_folder):
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m",
               "dmp_wb.training", "digits-quick", *LONG, "name=two"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as parent:
        run = Run(runs_folder / "two")
        end = time.monotonic() + 300
        while not run.metrics().get("step"):
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
        found = ears([psutil.Process(parent.pid), *children])
        for p in children: p.terminate()
        parent.communicate()
    assert found and set(found) == {"127.0.0.1"}
    assert not [p for p in (tmp_path / "tmp").rglob("*") if p.is_file() and "torchelastic" not in str(p)]
