"`make gpu`: the plain loop that it measures against, what it reports, and the tool itself in its tiny form."
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from argparse import Namespace
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dmp_wb as wb
import gpu
from benchmarks import reference
from conftest import randomise
from dmp_wb.diffusion.objectives import make_tables
from on_gpu import report as gpu_report
from on_gpu.device import peak_of
from on_gpu.speed import forward_flops

TOOL = Path(gpu.__file__)
KINDS = {"pretrain": {}, "dtr": {}, "dmp": {}, "dmp, by condition": {"gate_input": "condition"}}


def ours(kind, **settings):
    model = randomise(wb.DiT(sample_size=8, in_channels=4, out_channels=8, hidden_size=32, num_layers=3,
                             num_attention_heads=4, num_classes=10))
    if kind.startswith("dmp"): randomise(wb.patch(model, wb.DMPConfig(**settings)))
    if kind == "dtr": wb.route(model)
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_loops_loss_and_gradients_are_ours(kind):
    model, tables = ours(kind, **KINDS[kind]), make_tables()
    x, y = reference.latents(5, 8, classes=10)
    t, noise = torch.tensor([0, 1, 500, 999, 250]), torch.randn(5, 4, 8, 8)   # t = 0 has a likelihood of its own
    output = model(tables.add_noise(x, noise, t), timestep=t, class_labels=y).sample
    expected = wb.diffusion_losses(output, x, noise, t, tables)["loss"].mean()
    if kind.startswith("dmp"): expected = expected + wb.get_patch(model).balance_loss()
    expected.backward()
    loop = reference.Loop(model, kind.partition(",")[0])
    loss, _ = loop.loss(x, y, t, noise)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    if kind.startswith("dmp"):
        patch, gates = wb.get_patch(model), loop.model.gates
        torch.testing.assert_close(gates.gate.weight.grad, patch.gate.weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(gates.prompt_embeddings.grad, patch.prompts.grad, rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(loop.model.blocks[1].attn.qkv.weight.grad, model.blocks[1].attn.qkv.weight.grad,
                                   rtol=1e-3, atol=1e-6)


def test_the_plain_loop_keeps_the_gradients_of_a_backbone_that_it_does_not_step():
    loop, (x, y) = reference.Loop(ours("dmp"), "dmp"), reference.latents(4, 8, classes=10)
    before = {name: p.clone() for name, p in loop.model.named_parameters()}
    for _ in range(2): loop.step(x, y)
    changed = {name for name, p in loop.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"gates.prompt_embeddings", "gates.gate.weight", "gates.gate.bias"}
    assert all(p.grad is not None for p in loop.model.parameters())


@pytest.mark.parametrize("size", [dict(hidden_size=32, num_layers=3), dict(hidden_size=64, num_layers=1, patch_size=4)])
def test_flops_are_those_that_torch_counts(size):
    model = wb.DiT(sample_size=8, num_attention_heads=4, num_classes=10, **size)
    plain = reference.PlainDiT(model)
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain(torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    assert 3 * forward_flops(model) == pytest.approx(counted.get_total_flops(), rel=1e-6)


def test_peaks_are_by_name_and_unknown_devices_have_none():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H200") == 989e12 and peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA GeForce RTX 3060") is None


ROW = {"task": "training, dmp", "model": "DiT-XL/2", "what": "reference, cached latents", "precision": "bf16",
       "batch": 64, "images_per_second": 100.0, "mfu": 0.25, "peak_gib": 40.0, "waits": 3.0, "steps": 20}
REPORT = {"device": {"name": "NVIDIA H100 80GB HBM3", "peak_bf16_tflops": 989.0}, "date": "2026-11-26", "budget": 480,
          "versions": {"torch": "2.11.0", "dmp_wb": "0.1.0"}, "seconds": 470.0, "speeds": [],
          "checks": [{"name": "losses", "status": "ok"}, {"name": "compile", "status": "failed", "why": "it broke"}],
          "rows": gpu_report.against([ROW, {**ROW, "what": "ours, compiled", "images_per_second": 310.0, "mfu": None,
                                            "peak_gib": None, "waits": None}])}


def test_a_report_is_json_and_a_table(tmp_path):
    data, text = gpu_report.write(REPORT, tmp_path)
    assert data.name == "gpu-nvidia-h100-80gb-hbm3.json" and json.loads(data.read_text())["rows"][1]["against"] == 3.1
    written = text.read_text()
    assert "| ours, compiled | bf16 | 64 | 310.0 | 3.10 | – | – | – |" in written
    assert "1 of 2 checks" in written and "compile: failed, it broke" in written


@pytest.mark.parametrize("measured", [False, True])
def test_the_page_of_results_draws_what_was_measured_and_says_where_nothing_was(measured, tmp_path):
    folder = tmp_path / "nbs" / "experiments"
    folder.mkdir(parents=True)
    if measured: gpu_report.write(REPORT, folder)
    cells = nbformat.read(TOOL.parents[1] / "nbs" / "results.ipynb", 4).cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and "gpu-*.json" in c.source]
    *lines, last = source.rstrip().rsplit("\nMarkdown(", 1)
    space = {"project_root": lambda: tmp_path}
    exec(lines[0] + "\nshown = (" + last, space)
    said = ["XL/2 | ours, compiled, bf16 | 64 | 310.0 | 3.10", "1 of 2"] if measured else ["No GPU has been measured"]
    assert all(words in space["shown"] for words in said)


# ---- the process that watches: with one that only says what a worker would say

WORKER = """
import json, os, sys, time
file, first, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def say(event, **facts):
    with open(file, "a") as f: f.write(json.dumps({"event": event, **facts}) + "\\n")
names = [(0, "check", "good"), (1, "check", "bad"), (2, "speed", "last")]
say("device", device={"name": "none"}, versions={}, names=names)
for n, kind, name in names[first:]:
    say("begin", number=n, kind=kind, name=name)
    if name == "bad" and how == "dies": os._exit(9)
    if name == "bad" and how == "hangs": time.sleep(60)
    say("part", number=n, kind=kind, name=name, status="ok", seconds=0.1)
say("end")
"""


def watched(tmp_path, monkeypatch, how, budget=30.0):
    class Watch(gpu.Watch):
        def start(self):
            (self.folder / "log").touch()
            words = [str(self.folder / "events.jsonl"), str(self.next), how]
            return subprocess.Popen([sys.executable, "-c", WORKER, *words])
    watch = Watch(Namespace(deadline=time.time() + budget, without=[]), tmp_path)
    watch.run()
    return [(e["name"], e["status"], e.get("why")) for found in watch.found.values() for e in found]


def test_a_part_that_takes_the_process_with_it_stops_no_other(tmp_path, monkeypatch):
    good, bad, last = watched(tmp_path, monkeypatch, "dies")
    assert good[:2] == ("good", "ok") and last[:2] == ("last", "ok")
    assert bad[:2] == ("bad", "failed") and "status 9" in bad[2]


def test_a_check_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STUCK", 0.3)
    assert [s for _, s, _ in watched(tmp_path, monkeypatch, "hangs")] == ["ok", "failed", "ok"]


def test_what_the_budget_does_not_hold_is_skipped_with_a_line(tmp_path, monkeypatch, capsys):
    begun = time.time()
    found = watched(tmp_path, monkeypatch, "hangs", budget=1.5)
    assert time.time() - begun < 10
    assert [s for _, s, _ in found] == ["ok", "skipped", "skipped"] and found[2][2] == "the budget is spent"
    assert "skipped  last: the budget is spent" in capsys.readouterr().out


# ---- the tool itself

def run_tool(*words, **env):
    return subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_without_a_cuda_device_it_says_so_in_one_line(tmp_path):
    done = run_tool("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert done.stdout == "no CUDA device on this machine: nothing was checked and nothing measured\n"


LEFT_OUT = ["--without", "DMP, DiT-B/2", "DMP, DiT-S/2", "pre-training, DiT-XL/2"]


@pytest.mark.slow
def test_the_tiny_form_runs_on_a_cpu(tmp_path):
    done = run_tool("--device", "cpu", "--tiny", "--out", str(tmp_path), *LEFT_OUT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {c["status"] for c in report["checks"]} == {"ok", "skipped"}
    assert {s["status"] for s in report["speeds"]} == {"ok"}
    assert sum(c["status"] == "ok" for c in report["checks"]) >= 7
    assert {r["what"] for r in report["rows"]} >= {
        "reference, cached latents", "ours, eager", "reference, VAE in the loop", "DiTPipeline of diffusers"}
    assert all(r["images_per_second"] > 0 and r["against"] for r in report["rows"])


@pytest.mark.slow
def test_the_tiny_form_runs_on_a_second_device_and_counts_waits(tmp_path):
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        pytest.skip("no C++ compiler on this machine: apt-get install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("no headers of this Python: apt-get install python3-dev")
    done = run_tool("--device", "emu", "--tiny", "--out", str(tmp_path), *LEFT_OUT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-second-device.json").read_text())
    assert {s["status"] for s in report["speeds"]} == {"ok"}
    assert {c["name"] for c in report["checks"] if c["status"] != "ok"} <= {"two processes", "compile"}
    waits = {(r["task"], r["what"]): r["waits"] for r in report["rows"]}
    assert waits["training, dmp", "reference, cached latents"] >= 3
