"What version 0.1.0 wrote, in config format 1, loads, resumes and compares; `format1/write.py` says how it was made."
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_cells
from safetensors.torch import load_file

import dmp_wb as wb

FILES = Path(__file__).parent / "format1"
RUNS = sorted(p.name for p in (FILES / "runs").iterdir())
EXPECTED = json.loads((FILES / "expected.json").read_text())
METHODS = {"f1-pretrain": "pretrain", "f1-dtr": "pretrain + dtr", "f1-random-dtr-gradvac": "pretrain + dtr",
           "f1-finetune": "finetune", "f1-prompt-tuning": "prompt-tuning", "f1-dmp": "dmp",
           "f1-dmp-top-k-dtr-uw": "dmp + dtr"}
OF_THE_MACHINE = ("images_per_second", "memory_gib")


def same_machine() -> bool:
    "Whether sums are taken in the order of the machine that wrote the files: its torch on its kind of processor."
    sys.path.insert(0, str(FILES))
    try: from write import cpu
    finally: sys.path.remove(str(FILES))
    here = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu()}
    return here == EXPECTED["versions"]


TOLERANCE = {"rtol": 0, "atol": 0} if same_machine() else {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def runs(runs_folder):
    "The finished runs, where a user has theirs."
    shutil.copytree(FILES / "runs", runs_folder)
    return runs_folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("model/*.safetensors"), *run.glob("patch/*.safetensors")]
    return load_file(file)


def answers(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0, 500, 999])
    with torch.no_grad(): return model(x, timestep=t, class_labels=torch.tensor([1, 2, 10])).sample


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_of_format_1_resumes_to_the_weights_of_the_unbroken_one(name, runs, capsys):
    shutil.copytree(FILES / "killed" / name, runs / "killed" / name)
    left = wb.open_run(f"killed/{name}")
    assert not left.finished and left.steps_done == 4
    run = wb.train(left.folder / "config.yaml", folder=left.folder)
    assert "resumed at step 4" in capsys.readouterr().out
    unbroken = wb.open_run(name)
    assert run.finished and run.steps_done == unbroken.steps_done == 8
    mine, theirs = weights(run.folder), weights(unbroken.folder)
    assert mine.keys() == theirs.keys()
    for key in theirs: torch.testing.assert_close(mine[key], theirs[key], **TOLERANCE)
    assert run.metrics().keys() == unbroken.metrics().keys()
    for column, values in unbroken.metrics().items():
        if column in OF_THE_MACHINE: continue
        assert run.metrics()[column] == pytest.approx(values, rel=TOLERANCE["rtol"], abs=TOLERANCE["atol"]), column


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_of_format_1_is_not_trained_again(name, runs, capsys):
    before = {f: f.read_bytes() for f in (runs / name).rglob("*") if f.is_file()}
    run = wb.train(runs / name / "config.yaml", folder=runs / name)
    assert run.finished and "nothing to do" in capsys.readouterr().out
    assert all(f.read_bytes() == content for f, content in before.items())


def test_models_of_format_1_load_with_their_patches_and_routes(runs):
    plain = answers(wb.load_model("f1-pretrain"))
    for name in RUNS:
        model, method = wb.load_model(name), METHODS[name]
        assert (wb.get_router(model) is not None) == method.endswith("dtr"), name
        patched = method.startswith(("dmp", "prompt"))
        if not patched:
            loaded = model.state_dict()
            for key, value in weights(runs / name).items(): assert torch.equal(loaded[key], value), (name, key)
            continue
        patch = wb.get_patch(model)
        assert patch.gated == method.startswith("dmp")
        assert not torch.equal(answers(model), plain), name
        if wb.get_router(model): wb.unroute(model)
        wb.unpatch(model)
        assert torch.equal(answers(model), plain), name
        assert torch.equal(answers(wb.load_model(name, patched=False)), plain), name


def test_routes_of_format_1_keep_their_masks(runs):
    assert wb.get_router(wb.load_model("f1-dtr")).config == wb.DTRConfig(sharing_ratio=0.75, alpha=2.0)
    random = wb.get_router(wb.load_model("f1-random-dtr-gradvac")).config
    assert random == wb.DTRConfig(sharing_ratio=0.5, kind="random", seed=5)


@pytest.mark.parametrize("name", sorted(EXPECTED["gates"]))
def test_a_saved_patch_of_format_1_loads_with_its_gates(name, runs, tmp_path):
    model = wb.load_model("f1-pretrain")
    patch = wb.load_patch(model, FILES / "patches" / name)
    labels = {"class_labels": torch.tensor([1, 2, 10])} if name == "condition" else {}
    gates = patch.gates(torch.tensor([0, 500, 999]), **labels)
    torch.testing.assert_close(gates, torch.tensor(EXPECTED["gates"][name]), **TOLERANCE)
    wb.save_patch(model, tmp_path / "again")
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", FILES / "patches" / name))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_an_experiment_of_format_1_says_what_it_said(tmp_path):
    exp = wb.load_experiment(FILES / "experiment.yaml")
    assert (exp.method, exp.base, exp.name, exp.seed) == ("dmp", "digits-base", "my experiment/first", 7)
    assert (exp.optim.lr, exp.optim.betas, exp.train.mixed_precision) == (1e-3, (0.9, 0.99), "no")
    assert exp.schedule.num_train_timesteps == 500
    run = wb.train(exp, ["train.steps=2", "train.checkpoint_every=5", "train.cpu=true"], folder=tmp_path / "run")
    model = wb.load_model(run.folder)
    patch, route = wb.get_patch(model).config, wb.get_router(model).config
    assert (patch.mode, patch.gate_input, patch.num_prompts, patch.depth) == ("prepend", "condition", 6, [0, 2])
    assert (patch.top_k, patch.init, patch.noisy_gating) == (2, "random", True)
    assert (patch.importance_weight, patch.load_weight) == (0.001, 0.5)
    assert patch.num_train_timesteps == route.num_train_timesteps == 500
    assert (route.sharing_ratio, route.alpha, route.kind, route.seed) == (0.9, 3, "random", 2)


def test_overrides_of_format_1_say_what_they_said(runs):
    exp = wb.load_experiment("digits-dmp", ["patch.importance_weight=0.5", "patch.top_k=3", "routing.sharing_ratio=0.7",
                                            "base=f1-pretrain", "name=o", "train.steps=1", "train.cpu=true"])
    model = wb.load_model(wb.train(exp).folder)
    patch = wb.get_patch(model).config
    assert (patch.importance_weight, patch.top_k, wb.get_router(model).config.sharing_ratio) == (0.5, 3, 0.7)


def test_a_sweep_of_format_1_is_planned_as_it_was():
    from dmp_wb.sweeps import plan, read_sweep
    given = read_sweep(FILES / "sweep.yaml")
    assert given.pop("name") == "baselines"
    planned = plan(**given)
    expected = [f"{run},lr={lr}" for run in ("prompt-tuning", "dmp", "routed") for lr in ("0.001", "0.003")]
    assert [p.name for p in planned] == expected
    words = planned[2].parameters["overrides"]
    assert planned[2].parameters["experiment"] == "digits-dmp"
    exp = wb.load_experiment("digits-dmp", words)
    assert (exp.train.steps, exp.optim.lr, exp.train.log_with) == (2, 1e-3, None)


def test_runs_of_format_1_are_listed(runs):
    shutil.copytree(FILES / "killed", runs / "killed")
    found, faults = wb.list_runs()
    assert not faults
    assert {r.name: r.method for r in found} == METHODS | {f"killed/{name}": method for name, method in METHODS.items()}
    by_name = {r.name: r for r in found}
    assert (by_name["f1-dmp"].state, by_name["f1-dmp"].step, by_name["f1-dmp"].steps) == ("finished", 8, 8)
    assert by_name["killed/f1-dmp"].state != "finished" and by_name["killed/f1-dmp"].step == 6
    assert by_name["f1-dmp"].metrics["fid"] == wb.open_run("f1-dmp").summary["evaluations"][0]["fid"]
    chosen, _ = wb.list_runs(where=["method=dmp*", "patch.top_k=3", "state=finished"])
    assert [r.name for r in chosen] == ["f1-dmp-top-k-dtr-uw"]


def test_runs_of_format_1_are_compared(runs):
    names = ["f1-pretrain", "f1-dmp-top-k-dtr-uw", "f1-random-dtr-gradvac"]
    space = run_cells("compare", runs=" ".join(names), run=str(runs / "compared"), num_images=8, num_shown=8,
                      num_loss_images=8, num_inference_steps=2, rounds=2)
    compared, looked = space["compared"], space["looked"]
    assert list(compared.runs) == names and set(looked.drawn) == set(names) and set(looked.mse) == set(names)
    assert set(looked.gates) == {"f1-dmp-top-k-dtr-uw"}


def test_a_folder_of_samples_of_format_1_is_completed(runs):
    folder = runs / "f1-dmp/samples/ddim-3-g1.5-4"
    before = (folder / "000002.png").read_bytes()
    (folder / "000002.png").unlink()
    (folder / "samples.npz").unlink()
    assert wb.sample_run("f1-dmp", 4, sampler="ddim", num_inference_steps=3, device="cpu", quiet=True) == folder
    assert (folder / "samples.npz").exists()
    if same_machine(): assert (folder / "000002.png").read_bytes() == before
