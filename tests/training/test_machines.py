"Trainings over several machines: launches that meet, compare, lose each other; two on loopback are one."
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file

from dmp_wb.core.errors import BadInput
from dmp_wb.store.checkpoints import newest_checkpoint
from dmp_wb.store.run import Run
from dmp_wb.training import __main__ as command, distributed, launching, machines
from dmp_wb.training.distributed import check_shared, lost_processes, LostProcess
from dmp_wb.training.launching import first_cause, launch
from dmp_wb.training.machines import here, Machines, machines_of, meet, slurm_step

SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.log_every=1", "train.checkpoint_every=5", "optim.lr_scheduler=constant"]
LOOPBACK = {"num_machines": 2, "main_process_ip": "127.0.0.1"}


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(rank, port, *overrides, timeout=120):
    "A launch as on a machine of its own: by command, with a family of processes of its own."
    words = [*SMALL, *overrides, "--num-processes", "2", "--num-machines", "2", "--machine-rank", str(rank),
             "--main-process-ip", "127.0.0.1", "--main-process-port", str(port), "--machine-timeout", str(timeout)]
    return subprocess.Popen([sys.executable, "-m", "dmp_wb", "launch", "digits-quick", *words], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def family(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def ended(*launches, limit=300):
    try: return [p.communicate(timeout=limit) for p in launches]
    finally:
        for p in [child for launch in launches for child in family(launch)]:
            with contextlib.suppress(psutil.NoSuchProcess): p.kill()


@pytest.mark.slow
def test_two_machines_are_one_and_lose_each_other(runs_folder, port, monkeypatch):
    """One is killed: the other ends, in time and in a line. Both launched again end with the weights, the averages
    and the losses of two processes on one machine, to the bit."""
    both, run = [start(rank, port, "name=two", "train.steps=100000") for rank in (0, 1)], Run(runs_folder / "two")
    end = time.monotonic() + 300
    while len(run.metrics().get("step", [])) < 8:
        assert time.monotonic() < end and all(p.poll() is None for p in both), ended(*both, limit=1)
        time.sleep(0.1)
    for process in family(both[1]):
        with contextlib.suppress(psutil.NoSuchProcess): process.kill()
    (out, err), _ = ended(*both)
    said = err.strip().splitlines()[-1]
    assert both[0].returncode == 1 and f"machine 0 of 2, 2 processes in all: {here()}" in out
    assert said.startswith(f"error: machine 1 ({here()}) is gone: ") and "Traceback" not in err
    assert f"launch again on every machine to go on from {newest_checkpoint(run.folder).name}" in said

    at = int(newest_checkpoint(run.folder).name.removeprefix("step-"))
    again = [start(rank, port, "name=two", f"train.steps={at + 7}") for rank in (0, 1)]
    said = ended(*again)
    assert [p.returncode for p in again] == [0, 0] and f"resumed at step {at}" in said[0][0], said
    assert f"machine 1 of 2: machine 0 ({here()}) writes the run" in said[1][0]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = launch("digits-quick", [*SMALL, "name=one", f"train.steps={at + 7}"], num_processes=2)
    assert run.finished and run.metrics()["loss"] == one.metrics()["loss"]
    for file in ("model/diffusion_pytorch_model.safetensors",
                 f"checkpoints/{newest_checkpoint(one.folder).name}/model.safetensors"):
        a, b = load_file(run.folder / file), load_file(one.folder / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    # machine 1 writes a log and nothing else
    assert ({p.name for p in run.folder.iterdir()} - {p.name for p in one.folder.iterdir()}
            == {"launch-1.log"}), list(run.folder.iterdir())


def told(port, *facts, timeout=20.0, ranks=(0, 1), count=2, after=lambda link: link.end(), address="127.0.0.1"):
    "What launches on several machines are told, in threads of this process: nothing, or a line."
    lines = [None] * len(ranks)

    def one(i, rank, fact):
        try: after(meet(Machines(count, rank, address, port, timeout), fact))
        except BadInput as e: lines[i] = str(e)
    threads = [threading.Thread(target=one, args=(i, *pair)) for i, pair in enumerate(zip(ranks, facts, strict=True))]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    return lines


def test_launches_meet_and_compare_what_they_are_about_to_do(port):
    assert told(port, {"seed": 1, "betas": (0.9, 0.99)}, {"seed": 1, "betas": (0.9, 0.99)}) == [None, None]
    # the same port at once again, with three
    assert told(port, {}, {}, {}, ranks=(2, 0, 1), count=3) == [None] * 3
    line = (
        f"optim.lr is 0.1 on machine 0 ({here()}) and 0.2 on machine 1 ({here()}): expected the same on every machine")
    assert told(port, {"optim.lr": 0.1}, {"optim.lr": 0.2}) == [line, line]
    assert told(port, {}, {"data.name": "x"})[1].startswith("data.name is None on machine 0")


def test_a_machine_that_does_not_come_is_named(port):
    line = (
        f"1 of 2 machines came within 0.3 s: machine 1 did not reach 127.0.0.1:{port}; expected a launch on each, with "
        "this main_process_ip and port")
    assert told(port, {}, ranks=(0,), timeout=0.3) == [line]
    # those that came are told as well
    line = line.replace("1 of 2", "2 of 3").replace("machine 1 did", "machine 2 did").replace("0.3 s", "1 s")
    assert told(port, {}, {}, ranks=(0, 1), count=3, timeout=1.0) == [line, line]
    assert told(port, {}, ranks=(1,), timeout=0.3) == [
        f"machine 0 did not answer at 127.0.0.1:{port} within 0.3 s (connection refused): expected its launch to run "
        "there, "
        "and this main_process_ip and port on every machine"]


def test_two_launches_with_one_rank_are_told(port):
    same = f"machine_rank is 1 on {here()} and {here()}: expected another one on each machine"
    assert told(port, {}, {}, {}, ranks=(0, 1, 1), count=3) == [same] * 3
    assert told(port, {}, {}, ranks=(0, 2), timeout=5.0) == [f"machine_rank is 2 on {here()}: expected 1 to 1"] * 2


def test_strangers_and_launches_that_give_up_do_not_count(port):
    def knock():
        for word in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[1]\n", b""):
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as s:
                    s.sendall(word)
                    break
                time.sleep(0.05)
        lines.extend(told(port, {}, ranks=(1,)))
    lines, stranger = [], threading.Thread(target=knock)
    stranger.start()
    assert told(port, {}, ranks=(0,)) == [None]
    stranger.join(60)
    assert lines == [None]


def test_where_machine_0_cannot_listen(port):
    with socket.create_server(("127.0.0.1", port)):
        assert told(port, {}, ranks=(0,)) == [
            f"main_process_port is {port}, which is in use on machine 0 ({here()}): expected a free one, the same on "
            "every "
            "machine"]
    line, = told(port, {}, ranks=(0,), address="192.0.2.1")
    assert line.startswith(f"main_process_ip is 192.0.2.1, where machine 0 ({here()}) cannot listen (")
    assert line.endswith("127.0.0.1") or "127.0.0.1, " in line


@pytest.mark.parametrize("how, said", [("closes", "is gone: its launch was killed, or the machine"),
                                       ("is silent", "is gone: it has been silent for 0.5 s"),
                                       ("fails", ": no file data/faces: expected a folder")])
def test_what_goes_wrong_on_one_machine_is_told_on_all(port, how, said):
    over, found = threading.Event(), {}

    def after(link):
        rank = link.machines.rank
        if rank == 1:
            if how == "closes": link.peers[0].connection.close()
            elif how == "fails": link.end("no file data/faces: expected a folder", "BadInput")
            else: over.wait(20)
            return
        while not link.watch(): time.sleep(0.01)
        found[rank] = link.trouble, link.kind
        if rank == 2: over.set()
        else: over.wait(20)
        link.end()
    assert told(port, {}, {}, {}, ranks=(0, 1, 2), count=3, after=after, timeout=0.5 if how == "is silent" else 20) == [
        None] * 3
    assert found[0] == found[2] and found[0][0].startswith(f"machine 1 ({here()})") and found[0][0].endswith(said)
    assert found[0][1] == ("BadInput" if how == "fails" else "")


def test_machines_that_end_well_are_not_lost(port):
    ends = threading.Barrier(2, timeout=20)

    def after(link):
        if link.machines.rank: link.end()
        ends.wait()
        if not link.machines.rank:
            for _ in range(20):
                assert not link.watch()
                time.sleep(0.01)
            link.end()
    assert told(port, {}, {}, after=after) == [None, None]


def test_the_cause_is_what_did_not_follow_from_another_end(tmp_path):
    said, run = [], Run(tmp_path)

    def cause(error, trouble="", kind=""):
        link = SimpleNamespace(machines=Machines(2, 0, "a", 1, 0.2), trouble=trouble, kind=kind, watch=lambda: trouble,
                               end=lambda *words: said.append(words))
        found = first_cause(link, error, run)
        return found and (type(found).__name__, str(found))
    lost, again = LostProcess("closed by peer"), "launch again on every machine to go on from the beginning"
    assert cause(None) is None and said.pop() == ()
    assert cause(lost) == ("LostProcess", "closed by peer") and said.pop() == ("closed by peer", "BadInput")
    assert cause(lost, "machine 1 is gone") == (
        "RuntimeError", f"machine 1 is gone; {again}, there is no checkpoint yet") and said.pop() == ()
    assert cause(None, "machine 1: no data", "BadInput")[0] == "BadInput" and said.pop() == ()
    own = FloatingPointError("not finite")
    assert cause(own, "machine 1: not finite") == ("FloatingPointError", "not finite")
    assert said.pop() == ("not finite", "FloatingPointError")


def test_which_machines(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")): monkeypatch.delenv(name)
    assert machines_of() is None and machines_of(num_machines=1, machine_rank=0) is None
    assert machines_of(**LOOPBACK, machine_rank=1) == Machines(2, 1, "127.0.0.1", 29500, 300.0)
    config = ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="MULTI_CPU", mixed_precision="no",
                           use_cpu=True, debug=False, num_processes=4, num_machines=4, machine_rank=3,
                           main_process_ip="127.0.0.1", main_process_port=1234)
    assert machines_of(config) == Machines(4, 3, "127.0.0.1", 1234)
    assert machines_of(config, machine_rank=2, machine_timeout=7) == Machines(4, 2, "127.0.0.1", 1234, 7)
    assert machines_of(config, num_machines=1, machine_rank=0) is None
    for given, line in (({"num_machines": 0}, "num_machines is 0: expected at least 1"),
                        ({**LOOPBACK}, "machine_rank is not given: expected 0 to 1"),
                        ({**LOOPBACK, "machine_rank": 2}, "machine_rank is 2: expected 0 to 1, num_machines is 2"),
                        ({"machine_rank": 1}, "machine_rank is 1: expected 0, num_machines is 1"),
                        ({**LOOPBACK, "machine_rank": -1}, "machine_rank is -1"),
                        ({"num_machines": 2, "machine_rank": 0}, "main_process_ip is not given"),
                        ({"num_machines": 2, "machine_rank": 0, "main_process_ip": "no such name"},
                         "main_process_ip is 'no such name', a name that this machine does not know"),
                        ({**LOOPBACK, "machine_rank": 0, "main_process_port": 0},
                         "main_process_port is 0: expected 1 to"),
                        ({**LOOPBACK, "machine_rank": 0, "machine_timeout": 0}, "machine_timeout is 0: expected more")):
        with pytest.raises(BadInput, match=line): machines_of(**given)


def test_slurm_says_which_machines(monkeypatch):
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[7-8]",
            "SLURM_PROCID": "1", "SLURM_JOB_ID": "20017"}
    for name, value in step.items(): monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"): monkeypatch.delenv(name, raising=False)
    asked = []

    def scontrol(*words):
        asked.append(words)
        return "node7\nnode8\n" if "hostnames" in words else "NodeName=node7 NodeAddr=127.0.0.1 NodeHostName=x"
    monkeypatch.setattr(machines, "_scontrol", scontrol)
    # a name that Slurm alone knows
    assert machines_of() == Machines(2, 1, "127.0.0.1", 20017)
    assert asked == [("show", "hostnames", "node[7-8]"), ("show", "node", "--oneliner", "node7")]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    monkeypatch.setenv("MASTER_PORT", "77")
    assert machines_of() == Machines(2, 1, "127.0.0.2", 77)
    assert machines_of(main_process_port=5) == Machines(2, 1, "127.0.0.2", 5)
    assert machines_of(num_machines=1, machine_rank=0) is None   # of all that, nothing
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    with pytest.raises(BadInput, match="srun has started 16 tasks on 2 nodes: expected one launch on each"):
        slurm_step()
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert slurm_step() == {}


def test_what_cannot_work_on_several_machines_starts_nothing(tmp_path, runs_folder, monkeypatch):
    def never(*_, **__): raise AssertionError("a process was started, or another machine waited for")
    monkeypatch.setattr(launching.subprocess, "Popen", never)
    monkeypatch.setattr(launching, "meet", never)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def refused(message, overrides=(), **more):
        with pytest.raises(BadInput, match=message): launch("digits-quick", [*SMALL, *overrides], **more)
    pair = {**LOOPBACK, "machine_rank": 0}
    refused("num_processes is 3: expected a multiple of num_machines 2", num_processes=3, **pair)
    refused("num_processes is 6: expected at most 2 for each of 2 machines", num_processes=6, **pair)
    refused("train.batch_size is 9: expected a multiple of 2 processes", ["train.batch_size=9"], **pair)
    refused("machine_rank is 5", num_processes=2, **{**pair, "machine_rank": 5})
    assert not runs_folder.exists()


def test_the_launch_of_one_of_several_machines(runs_folder, monkeypatch):
    class Started(Exception): pass

    def popen(command, env, **_): raise Started(command, env)
    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    ended = []
    monkeypatch.setattr(launching, "meet", lambda m, facts: SimpleNamespace(
        machines=m, interface="lo", end=lambda line, kind: ended.append(kind),
        peers=[SimpleNamespace(host="node1", name="machine 0 (node1)")]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    given = {**LOOPBACK, "num_processes": 4, "machine_rank": 1, "machine_timeout": 9}
    seconds = launching._see_folder.__defaults__
    monkeypatch.setattr(launching._see_folder, "__defaults__", (0.3,))
    with pytest.raises(BadInput,
                       match=f"{here()} does not see the run folder .*/a of machine 0 .node1.: expected a folder"):
        launch("digits-quick", [*SMALL, "name=a"], **given)
    assert ended.pop() == "BadInput" and seconds[0] >= 5
    (runs_folder / "a").mkdir(parents=True)   # as machine 0 does
    with pytest.raises(Started) as e: launch("digits-quick", [*SMALL, "name=a"], **given)
    assert ended.pop() == "Started"
    words, env = e.value.args
    line = " ".join(words)
    assert ("--num_processes 4 --rdzv_backend static --rdzv_conf timeout=9 --num_machines 2 --machine_rank 1 "
            "--main_process_ip 127.0.0.1 --main_process_port 29500 -m dmp_wb.training") in line
    assert env["GLOO_SOCKET_IFNAME"] == "lo" and env["OMP_NUM_THREADS"] == "2" and env["DMP_WB_PROCESSES"] == "4"
    assert "PET_RDZV_ENDPOINT" not in env and not (runs_folder / "a" / "launch.log").exists()
    assert "4 processes over 2 machines, here 1" in (runs_folder / "a" / "launch-1.log").read_text()


def test_the_others_launch_what_the_first_launches(tmp_path, runs_folder, monkeypatch):
    calls = []

    def stop(machines, exp, n):
        calls.append((machines, exp, n))
        raise BadInput("enough")
    monkeypatch.setattr(launching, "_meet", stop)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("DMP_WB_FOLLOW", str(tmp_path / "call.json"))
    with pytest.raises(BadInput, match="enough"):
        launch("digits-quick", [*SMALL, "name=a"], num_processes=4, machine_rank=0, machine_timeout=9, **LOOPBACK)
    monkeypatch.delenv("DMP_WB_FOLLOW")
    with pytest.raises(BadInput, match="enough"): launching.follow(tmp_path / "call.json", 1)
    (zero, mine, n), (one, theirs, m) = calls
    assert (one, theirs, m) == (Machines(2, 1, zero.address, zero.port, 9), mine, n)


def test_cpu_processes_of_several_machines(tmp_path, monkeypatch):
    "accelerate leaves CPU processes to MPI; they are started all the same, on each machine its own."
    class Became(Exception): pass

    def execv(program, words): raise Became(" ".join(words))
    monkeypatch.setattr(os, "execv", execv)
    line = ["accelerate", "launch", "--cpu"]
    monkeypatch.setattr(command.psutil, "Process", lambda pid: SimpleNamespace(cmdline=lambda: line))
    for name in command.RANKS: monkeypatch.delenv(name, raising=False)

    def becomes(*words):
        line[3:] = words
        for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.7",
                            "MASTER_PORT": "4455"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Became) as e: command.start_cpu_processes(["digits-quick"])
        return str(e.value)
    expected = (
        "--nnodes 2 --node_rank 1 --master_addr 10.0.0.7 --master_port 4455 --nproc_per_node 2 -m dmp_wb.training "
        "digits-quick")
    assert expected in becomes("--num_machines=2", "--machine_rank", "1", "--num_processes", "4")
    ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="MULTI_CPU", mixed_precision="no", use_cpu=True,
                  debug=False, num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.0.0.7",
                  main_process_port=4455).to_yaml_file(tmp_path / "two.yaml")
    assert expected in becomes("--config_file", str(tmp_path / "two.yaml"))
    with pytest.raises(BadInput, match="num_processes is 3: expected a multiple of num_machines 2"):
        becomes("--num_machines", "2", "--num-processes=3")


def test_a_machine_that_does_not_see_the_run_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    marks = []
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda objects: marks.extend(objects))
    monkeypatch.setattr(distributed, "gather_object", lambda found: [*found, "node8"])
    main = SimpleNamespace(is_main_process=True)
    with pytest.raises(BadInput, match=f"node8 does not see the run folder {tmp_path} of process 0: expected a folder"):
        check_shared(main, tmp_path)
    assert not list(tmp_path.iterdir()) and len(marks) == 1
    monkeypatch.setattr(distributed, "gather_object", lambda found: found)
    check_shared(main, tmp_path)
    other = SimpleNamespace(is_main_process=False)   # which sees nothing of it
    with pytest.raises(BadInput, match="does not see the run folder"): check_shared(other, tmp_path, seconds=0.3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")   # one machine
    check_shared(other, tmp_path / "nowhere")


def test_torchs_errors_about_a_process_that_is_gone_are_one_line(monkeypatch):
    def raised(error, world="2"):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(type(error) if world == "1" else Exception) as e, lost_processes(): raise error
        return e.value
    gloo = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:8\n more")
    assert isinstance(raised(gloo), LostProcess) and "\n" not in str(raised(gloo))
    assert "start them again to go on from the newest checkpoint" in str(raised(gloo)) and raised(gloo).local
    assert isinstance(raised(torch.distributed.DistStoreError("wait timeout after 300000ms")), LostProcess)
    assert raised(gloo, world="1") is gloo
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert raised(other) is other and isinstance(raised(BadInput("no")), BadInput)


def test_what_is_said_right_after_the_beginning_is_heard(port):
    "A machine may fail before another has read that the training begins."
    with socket.create_server(("127.0.0.1", port)) as server:
        heard = []
        joining = threading.Thread(target=lambda: heard.append(meet(Machines(2, 1, "127.0.0.1", port, 20), {})))
        joining.start()
        connection = server.accept()[0]
        connection.recv(1000)
        connection.sendall(b'{"go": "node1"}\n{"failed": "machine 2 is gone", "far": true}\n')
        joining.join(20)
        assert heard[0].watch() == "machine 2 is gone" and heard[0].peers[0].host == "node1"
        connection.close()
        heard[0].end()
