"`effects` and `transfer`: on a model whose answer is known."
import contextlib

import pytest
import torch
from conftest import tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.data.load import load_data
from dmp_wb.diffusion.objectives import diffusion_losses, make_tables
from dmp_wb.evaluation.effects import effects, transfer
from dmp_wb.methods.interventions import intervene

# a patch that acts and has learned at these timesteps and in block 1 alone
ELSEWHERE = (dict(blocks=[0, 2, 3]), dict(timesteps=(0, 199)), dict(timesteps=(400, 999)))


def only_there(model):
    stack = contextlib.ExitStack()
    for where in ELSEWHERE: stack.enter_context(intervene(model, **where))
    return stack


@pytest.fixture(scope="module")
def known():
    model, data, tables = wb.load_model("digits-base", device="cpu"), load_data("digits-slanted"), make_tables()
    patch, g = wb.patch(model), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(patch.parameters(), lr=0.02)
    patch.train()
    for _ in range(40):
        batch = data.batch(torch.randint(len(data), (64,), generator=g))
        t, noise = torch.randint(200, 400, (64,), generator=g), torch.randn(64, 1, 8, 8, generator=g)
        with only_there(model):
            out = model(tables.add_noise(batch["images"], noise, t), timestep=t, class_labels=batch["class_labels"])
        loss = diffusion_losses(out.sample, batch["images"], noise, t, tables)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    patch.eval()
    return model.eval(), data


def test_a_patch_that_learned_in_one_place_is_needed_there_and_nowhere_else(known):
    model, data = known
    with only_there(model): found = effects(model, data, intervals=5, num_images=48, quiet=True)
    there = torch.zeros(5, 4, dtype=torch.bool)
    there[1, 1] = True
    for what in ("needed", "alone"):
        values = getattr(found, what)
        assert values.shape == (5, 4, 48) and values[~there].eq(0).all() and values[there].mean() > 0.01
        assert torch.equal(found.certain(what), there)
        low, high = found.interval(what)
        assert low[1, 1] > 0 and (low <= values.mean(-1)).all() and (values.mean(-1) <= high).all()
    assert torch.equal(found.whole[1], found.needed[1, 1]) and found.blocks == [(0,), (1,), (2,), (3,)]


def test_needed_and_alone_differ_where_blocks_work_together():
    model = wb.load_model("digits-slanted", device="cpu")
    found = effects(model, "digits-slanted", intervals=4, num_images=32, quiet=True)
    assert (found.needed.mean(-1)[0] > 0).all()
    assert not torch.allclose(found.needed[0].sum(0), found.whole[0], rtol=0.05)
    again = effects(model, "digits-slanted", intervals=4, num_images=32, quiet=True)
    assert torch.equal(found.needed, again.needed)
    other = effects(model, "digits-slanted", intervals=4, num_images=32, seed=1, quiet=True)
    assert not torch.equal(found.needed, other.needed)


def test_the_loss_is_that_of_the_model_under_each_gate():
    model = wb.load_model("digits-slanted", device="cpu")
    found = transfer(model, "digits-slanted", intervals=4, num_images=16, quiet=True)
    mean = found.change.mean(-1)
    assert found.change.shape == (4, 4, 16) and mean[3, 0] > 5 * mean[0, 0].abs()
    assert found.loss.mean(1)[0] > found.loss.mean(1)[3]


def test_what_cannot_be_asked_is_one_line():
    plain = tiny_dit()
    wb.patch(plain)
    with pytest.raises(BadInput, match="expected one that load_model read"): effects(plain, "digits")
    with pytest.raises(BadInput, match="has no method on it"):
        effects(wb.load_model("digits-base", device="cpu"), "digits", intervals=2, num_images=4, quiet=True)
    with pytest.raises(BadInput, match="intervals"): effects(wb.load_model("digits-dmp"), "digits", intervals=0)
