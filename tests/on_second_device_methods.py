"""Every method where the model is on a GPU: training, resuming, sampling, drawing, offloading.
Run by `test_second_device.py`, beside `on_second_device.py`."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "second_device"))
from second_device import DEVICE, reset, waits  # noqa: E402
from waits import METHODS, on_dit, RUNS, train_run  # noqa: E402

from accelerate import cpu_offload, cpu_offload_with_hook  # noqa: E402
from backbones import BACKBONES, INPUT_SIZE, inputs_for, output  # noqa: E402
from conftest import randomise, tiny_dit  # noqa: E402

import dmp_wb as wb  # noqa: E402
from dmp_wb.core.errors import BadInput  # noqa: E402
from dmp_wb.look.explore import DenoiseExplorer, RoutingExplorer  # noqa: E402
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint  # noqa: E402


def numbers(tree, path=""):
    "The tensors of a tree, by their place in it."
    if isinstance(tree, torch.Tensor): return {path: tree}
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for name, part in inside for k, v in numbers(part, f"{path}.{name}").items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_method_trains_as_on_the_cpu_and_resumes_to_the_bit(name, tmp_path):
    steps = ["train.steps=4", "train.checkpoint_every=2", "train.keep_last=3", "train.log_every=1"]
    whole = train_run(name, tmp_path / "whole", steps)
    expected = train_run(name, tmp_path / "cpu", [*steps, "train.cpu=true"]).metrics()["loss"]
    assert whole.metrics()["loss"] == pytest.approx(expected, rel=1e-3), "the weights that it trains are others"
    want = numbers(load_checkpoint(newest_checkpoint(whole.folder)))
    shutil.copytree(whole.folder, tmp_path / "resumed")
    (tmp_path / "resumed" / "summary.json").unlink()
    shutil.rmtree(newest_checkpoint(tmp_path / "resumed"))
    resumed = train_run(name, tmp_path / "resumed", steps)
    found = numbers(load_checkpoint(newest_checkpoint(resumed.folder)))
    assert found.keys() == want.keys() and len(want) > 2
    for key, value in want.items(): assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_a_method_samples_and_draws_as_on_the_cpu(name):
    model, method = on_dit(name)
    randomise(method, 0.3) if isinstance(method, torch.nn.Module) else None
    model.eval()
    times = torch.arange(0, 1000, 250)
    want = wb.sample(model, 3, num_inference_steps=3, quiet=True), [p.values for p in method.panels(times)]
    model.to(DEVICE)
    found = wb.sample(model, 3, num_inference_steps=3, quiet=True), [p.values for p in method.panels(times)]
    torch.testing.assert_close(found[0], want[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(found[1], want[1], strict=True): torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


def test_explorers_of_routes_and_walks_on_a_device():
    explorer = RoutingExplorer(64)
    explorer.frame()
    explorer.static()
    model = tiny_dit()
    wb.route(model)
    DenoiseExplorer(model.to(DEVICE)).frame()


def late(model, kind):
    "The model with its weights on the CPU until they are needed, by diffusers or by accelerate."
    if kind == "sequential": cpu_offload(model, DEVICE, offload_buffers=True)
    elif kind == "model": cpu_offload_with_hook(model, DEVICE)
    else:
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(onload_device=DEVICE, offload_device=torch.device("cpu"), offload_type=kind, **more)


@pytest.mark.parametrize("order", ["patched first", "offloaded first"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "sequential", "model"])
@pytest.mark.parametrize("name", ["DiT", "UNet2DConditionModel-SD15", "FluxTransformer2DModel"])
def test_weights_that_come_to_the_device_as_they_are_called(name, kind, order):
    config, kwargs = wb.DMPConfig(input_size=INPUT_SIZE.get(name)), inputs_for(name)
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    def changed(model): return randomise(wb.patch(model, config), 0.3), wb.route(model)
    model = BACKBONES[name]()
    changed(model)
    want = output(model, kwargs)
    model = BACKBONES[name]()
    if order == "offloaded first": late(model, kind)
    changed(model)
    if order == "patched first": late(model, kind)
    for _ in range(2):
        torch.testing.assert_close(output(model, there).cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in METHODS if "dtr" not in n])
def test_a_method_on_another_device_than_its_model_is_one_error(name):
    model, method = on_dit(name)
    model.eval().to(DEVICE)
    method.cpu()
    with pytest.raises((BadInput, RuntimeError), match="one device|same device"):
        wb.sample(model, 2, num_inference_steps=2, quiet=True)
        raise BadInput("expected one device: but it was moved, which is as well")
    model.to(DEVICE)
    wb.sample(model, 2, num_inference_steps=2, quiet=True)


def test_another_grid_is_seen_a_pass_later():
    "A transposed image has as many tokens: that it has other sides is read when it has come from the device."
    name = "FluxTransformer2DModel"
    model = BACKBONES[name]()
    wb.patch(model, wb.DMPConfig(input_size=(12, 8), init="random"))
    kwargs = inputs_for(name)
    with pytest.raises(BadInput, match="4 × 6"): output(model, kwargs)
    there = {k: v.to(DEVICE) for k, v in kwargs.items()}
    model.to(DEVICE)
    output(model, there)
    with pytest.raises(BadInput, match="4 × 6"): output(model, there)


def test_a_timestep_that_the_table_lacks_is_an_error_at_the_end_of_the_block():
    model = tiny_dit()
    patch = wb.patch(model, wb.DMPConfig(init="random"))
    model.to(DEVICE)
    x, labels = torch.randn(2, 1, 8, 8, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    at = lambda t: model(x, timestep=torch.tensor(t, device=DEVICE), class_labels=labels)
    with pytest.raises(BadInput, match="timestep 600 is not in the baked table of 2"), patch.baked([999, 300]):
        at(999)
        at(600)
        reset()
        at(300)
        assert waits() == 1   # for the timestep, which was copied
    with pytest.raises(KeyError), patch.baked([999]):   # an error inside comes first
        at(600)
        raise KeyError
    with patch.baked([999, 300]): at(300)
