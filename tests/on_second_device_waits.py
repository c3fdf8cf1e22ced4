"""How often the host waits for a GPU: nothing that runs once a pass or once a step may add to it.
Run by `test_second_device.py`, beside `on_second_device.py`. `tools/second_device/waits.py --where` names lines."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "second_device"))
from second_device import DEVICE, reset, waits  # noqa: E402
from waits import forward_waits, sampling_waits, training_waits  # noqa: E402

# of diffusers: DDPM's noise is drawn on the CPU, so that images are equal everywhere; UniPC copies its coefficients
SAMPLERS = {"ddpm": 1, "unipc": 7}


def test_no_forward_pass_waits():
    found = forward_waits()
    kinds = {"patched", "patched, half", "baked", "routed", "both"}
    assert len(found) > 20 and kinds <= found["FluxTransformer2DModel"].keys()
    assert not {(name, kind): n for name, row in found.items() for kind, n in row.items() if n}


def test_a_sampling_step_waits_for_nothing_of_ours():
    found = sampling_waits()
    assert not {(name, kind): n for name, row in found.items() for kind, n in row.items() if n > SAMPLERS.get(name, 0)}


def test_a_training_step_waits_once():
    found = training_waits()
    assert len(found) > 7 and not {name: n for name, n in found.items() if n > 1}


@pytest.mark.parametrize("run, expected", [
    (lambda x: x.sum().item(), 1), (lambda x: bool((x > 0).any()), 1), (lambda x: x.cpu(), 1),
    (lambda x: torch.tensor([1, 2], device=DEVICE), 1), (lambda x: x[torch.tensor([0, 1])], 1),
    (lambda x: x[x > 0], 1), (lambda x: x.bool().long().bincount(), 1),
    (lambda x: x.masked_fill(x > 0, torch.zeros((), device=DEVICE)), 1), (lambda x: x.masked_fill(x > 0, 0.0), 0),
    (lambda x: torch.where(x > 0, torch.tensor(1.0), x), 1), (lambda x: x.to("cpu", non_blocking=True), 0),
    (lambda x: torch.full((2,), 3, device=DEVICE), 0), (lambda x: x + 1, 0)])
def test_what_is_a_wait(run, expected):
    x = torch.arange(4.0).to(DEVICE)
    reset()
    run(x)
    assert waits() == expected
