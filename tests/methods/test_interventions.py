"`intervene`: what it changes, what it leaves alone, and where."
import threading

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.base import methods_of
from dmp_wb.methods.interventions import HOWS, intervene, Intervention, turned_off
from dmp_wb.methods.settings import LearnedMaskConfig, SwitchConfig, TLoRAConfig

METHODS = {
    "dmp": {"dmp": wb.DMPConfig()},
    "dmp of a condition": {"dmp": wb.DMPConfig(gate_input="condition")},
    "dmp of both": {"dmp": wb.DMPConfig(gate_input="timestep+condition")},
    "dmp, top 2, two blocks": {"dmp": wb.DMPConfig(top_k=2, depth=[0, 2])},
    "dtr": {"dtr": wb.DTRConfig()},
    "r-tr": {"dtr": wb.DTRConfig(kind="random", sharing_ratio=0.5)},
    "lmask": {"lmask": LearnedMaskConfig()},
    "switch": {"switch": SwitchConfig()},
    "tlora": {"tlora": TLoRAConfig()},
    "tlora, rank": {"tlora": TLoRAConfig(form="rank")},
    "dmp and dtr": {"dmp": wb.DMPConfig(), "dtr": wb.DTRConfig()},
}
T = torch.tensor([20, 150, 299, 300, 870])
INSIDE = torch.tensor([False, True, True, False, False])   # of (100, 299)
LABELS = torch.tensor([0, 1, 2, 3, 10])
X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def model_with(name, **changes):
    model = tiny_dit(**changes)
    wb.apply_methods(model, METHODS[name])
    for method in methods_of(model).values():
        if isinstance(method, torch.nn.Module): randomise(method, 0.3)
    return model.eval()


def close(found, expected): torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def answer(model, t=T): return model(X[:len(t)], timestep=t, class_labels=LABELS[:len(t)]).sample


@pytest.mark.parametrize("name", METHODS)
def test_off_is_the_model_without_its_methods_where_it_is_asked_for(name):
    model, plain = model_with(name), answer(tiny_dit())
    usual = answer(model)
    assert (usual - plain).abs().max() > 1e-3
    with intervene(model): assert torch.equal(answer(model), plain)
    with intervene(model, timesteps=(100, 299)):
        found = answer(model)
    assert torch.equal(found, torch.where(INSIDE[:, None, None, None], plain, usual))
    assert torch.equal(answer(model), usual)


@pytest.mark.parametrize("name", METHODS)
def test_the_gate_of_a_timestep_in_the_place_of_all(name):
    "With a patch alone the answer differs from that at the other timestep, so gates are told by what they do."
    model = model_with(name)
    usual = answer(model)
    with intervene(model, at=150): held = answer(model)
    close(held[1], usual[1])
    assert (held[4] - usual[4]).abs().max() > 1e-4
    with intervene(model, (100, 299), at=870): part = answer(model)
    with intervene(model, at=870): every = answer(model)
    close(part, torch.where(INSIDE[:, None, None, None], every, usual))


@pytest.mark.parametrize("name", METHODS)
def test_strengths(name):
    model = model_with(name)
    usual = answer(model)
    with intervene(model, scale=1.0): assert torch.equal(answer(model), usual)
    with intervene(model): without = answer(model)
    with intervene(model, scale=0.0): assert torch.equal(answer(model), without)
    with intervene(model, scale=0.5): half = answer(model)
    assert not torch.equal(half, usual) and not torch.equal(half, without)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", HOWS)
def test_one_timestep_for_a_batch_gives_what_one_for_each_sample_gives(name, how):
    "As a sampler and as a training call the model."
    model = model_with(name)
    with torch.no_grad(), intervene(model, (100, 299), gate=how):
        for t in (150, 870):
            each = model(X, timestep=torch.full((5,), t), class_labels=LABELS).sample
            one = model(X, timestep=torch.tensor(t), class_labels=LABELS).sample
            close(one, each)


@pytest.mark.parametrize("name", METHODS)
def test_blocks_that_are_not_named_are_left_alone(name):
    model = model_with(name)
    with intervene(model): without = answer(model)
    blocks = [0, 2]
    with intervene(model, blocks=blocks[:1]), intervene(model, blocks=1 if "two blocks" not in name else 2):
        inside = answer(model)
    if "two blocks" in name: assert torch.equal(inside, without)
    else:
        with intervene(model, blocks=[0, 1]): assert torch.equal(answer(model), inside)
        with intervene(model, blocks=2): assert torch.equal(answer(model)[0], answer(model)[0])
        assert not torch.equal(inside, without)


def test_gates_say_what_acts():
    model = model_with("dmp")
    patch, t = wb.get_patch(model), torch.arange(1000)
    usual = patch.gates(t)
    with intervene(model, gate="mean"): mean = patch.gates(T)
    torch.testing.assert_close(mean, usual.mean(0, keepdim=True).expand(5, -1, -1))
    with intervene(model, gate="uniform"): torch.testing.assert_close(patch.gates(T), torch.full_like(mean, 1 / 16))
    with intervene(model, gate="shuffled", seed=3): shuffled = patch.gates(t)
    assert not torch.equal(shuffled, usual)
    key = lambda g: torch.sort(g[:, 0, 0]).values
    torch.testing.assert_close(key(shuffled), key(usual))   # the same gates, at other timesteps
    with intervene(model, at=500): close(patch.gates([3])[0], usual[500])
    with intervene(model, prompts=[0, 5], blocks=1): found = patch.gates(t)
    assert found[:, 1, [0, 5]].eq(0).all()
    found[:, 1, [0, 5]] = usual[:, 1, [0, 5]]
    assert torch.equal(found, usual)


def test_masks_and_panels_say_what_acts():
    model = model_with("dtr")
    router = wb.get_router(model)
    usual = router.masks(range(1000), 32)
    with intervene(model, (0, 499), at=999):
        assert torch.equal(router.masks(range(500), 32), usual[999:].expand(500, -1))
        (panel,) = router.panels(range(1000))
    assert torch.equal(panel.values[500:], usual[500:]) and torch.equal(panel.values[0], usual[999])
    with intervene(model, gate="uniform"):
        torch.testing.assert_close(router.masks([7], 32), torch.full((1, 32), usual[7].mean().item()))


def test_contexts_inside_each_other_act_on_what_the_outer_ones_left():
    model, t = model_with("dmp"), torch.tensor([10, 700])
    patch = wb.get_patch(model)
    usual = patch.gates([10, 700, 300])
    with intervene(model, at=300):
        with intervene(model, (0, 99), scale=2.0):
            close(patch.gates(t), torch.stack([2 * usual[2], usual[2]]))
        close(patch.gates(t), usual[[2, 2]])
    with pytest.raises(RuntimeError), intervene(model): raise RuntimeError
    close(patch.gates(t), usual[:2])


def test_another_thread_is_left_alone():
    model, found = model_with("dmp"), []
    usual = answer(model)
    with intervene(model):
        thread = threading.Thread(target=lambda: found.append(answer(model)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], usual)


@pytest.mark.parametrize("name", ["dmp", "dmp of a condition", "dtr", "switch", "tlora", "dmp and dtr"])
def test_samples_are_those_of_the_model_that_is_left(name):
    model = model_with(name)
    draw = lambda m: wb.sample(m, class_labels=[1, 2], guidance_scale=1.5, sampler="ddim", num_inference_steps=4,
                               clamp=False, quiet=True)
    plain, usual = draw(tiny_dit()), draw(model)
    with intervene(model): torch.testing.assert_close(draw(model), plain)
    assert torch.equal(draw(model), usual)
    with intervene(model, at=333): assert not torch.equal(draw(model), usual)   # at no step of this sampler


def test_a_table_that_was_made_before_is_not_used_and_one_made_inside_is():
    model, t = model_with("dmp"), torch.tensor([500])
    patch = wb.get_patch(model)
    with intervene(model): off = answer(model, t)
    usual = answer(model, t)
    with patch.baked(t):
        with intervene(model): assert torch.equal(answer(model, t), off)
        torch.testing.assert_close(answer(model, t), usual)
    with intervene(model), patch.baked(t): assert torch.equal(answer(model, t), off)


def test_a_patch_by_its_name_and_a_method_by_its_own():
    model = model_with("dmp and dtr")
    masks = wb.get_router(model).masks([5], 32)
    with intervene(model, method="dmp"):
        assert wb.get_patch(model).gates([5]).eq(0).all() and torch.equal(wb.get_router(model).masks([5], 32), masks)
    with intervene(model, method="dtr"): assert wb.get_router(model).masks([5], 32).eq(1).all()
    second = wb.patch(model, name="second")
    with intervene(model, method="second"):
        assert second.gates([5]).eq(0).all() and wb.get_patch(model, "default").gates([5]).sum() > 0


def test_a_compiled_model_is_changed_too():
    model = model_with("dmp")
    compiled = torch.compile(model, backend="eager")
    usual = answer(compiled)
    with intervene(compiled, (100, 299)):
        expected = answer(model)
        torch.testing.assert_close(answer(compiled), expected)
        assert not torch.equal(expected, usual)
    torch.testing.assert_close(answer(compiled), usual)


def test_prepended_prompts_that_are_off_are_no_tokens():
    model, plain = tiny_dit(), answer(tiny_dit())
    patch = randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=4, depth=2)), 0.3)
    usual = answer(model)
    assert (usual - plain).abs().max() > 1e-3
    with intervene(model): assert torch.equal(answer(model), plain)
    with intervene(model, (100, 299)):
        close(answer(model, T[1:3]), answer(tiny_dit(), T[1:3]))
        with pytest.raises(BadInput, match="takes the prompts from some samples of this batch"): answer(model)
    with intervene(model, blocks=0): first = answer(model)
    with intervene(model, blocks=1): second = answer(model)
    for one in (first, second): assert (one - plain).abs().max() > 1e-4 and (one - usual).abs().max() > 1e-4
    assert patch.blocks and torch.equal(answer(model), usual)


def test_gradients_reach_the_patch_where_it_acts():
    model = model_with("dmp")
    patch = wb.get_patch(model).train()
    with intervene(model, (100, 299)):
        model(X, timestep=T, class_labels=LABELS).sample.square().sum().backward()
        acts = patch.prompts.grad.abs().sum()
        patch.zero_grad()
        model(X[1:3], timestep=T[1:3], class_labels=LABELS[1:3]).sample.square().sum().backward()
    assert acts > 0 and patch.prompts.grad.eq(0).all()


def test_timesteps_of_flow_matching_between_whole_numbers():
    model = model_with("dmp")
    with intervene(model, (900, 999)):
        sums = wb.get_patch(model).gates(torch.tensor([899.9, 900.0, 998.5])).sum((1, 2))
    assert sums[0] > 0 and sums[1:].eq(0).all()


def test_a_whole_timestep_is_inside_though_the_model_takes_thousandths():
    t = torch.arange(1000)
    asked = (t / 1000) * 1000   # as of Flux; 250.99998 is 251
    assert (asked.floor() != t).any()
    for first in (251, 502, 999): assert torch.equal(Intervention("off", timesteps=(first, 999)).inside(asked, 1000),
                                                     t >= first)


@pytest.mark.parametrize("blocks", [np.int64(1), np.array([1]), torch.tensor(1), torch.tensor([1]), (np.int32(1),)])
def test_numbers_of_numpy_and_torch_are_numbers(blocks):
    model = model_with("dmp")
    with intervene(model, blocks=1): expected = answer(model)
    with intervene(model, blocks=blocks): assert torch.equal(answer(model), expected)
    with turned_off(model, blocks=blocks): assert torch.equal(answer(model), expected)
    with intervene(model, prompts=blocks): assert wb.get_patch(model).gates([5])[:, :, 1].eq(0).all()


def test_the_mean_gate_of_a_condition_is_no_graph_of_a_thousand_passes():
    model, nodes = model_with("dmp of a condition"), []
    compiled = torch.compile(model, backend=lambda graph, _: nodes.append(len(graph.graph.nodes)) or graph)
    with intervene(model, gate="mean"): close(answer(compiled), answer(model))
    assert max(nodes) < 1000


@pytest.mark.parametrize("given, said", [
    ({"timesteps": (5, 1)}, r"timesteps is \(5, 1\): expected the first and the last of an interval, in 0 to 999"),
    ({"timesteps": 7}, "timesteps is 7: expected the first and the last"),
    ({"timesteps": (0, 1000)}, "in 0 to 999"),
    ({"blocks": [0, 3]}, "blocks has 3: expected some of 0, 1, 2"),
    ({"blocks": []}, "blocks is empty"), ({"blocks": [-1]}, "blocks has -1"), ({"blocks": [True]}, "blocks has True"),
    ({"prompts": 16}, "prompts has 16: expected some of 0, 1"),
    ({"gate": "of"}, "unknown gate 'of'"), ({"at": 1000}, "at is 1000: expected a timestep in 0 to 999"),
    ({"scale": float("nan")}, "scale is nan: expected a number"), ({"at": 3, "scale": 2}, "more than one of"),
    ({"at": "500"}, "at is '500': expected a timestep"), ({"scale": "half"}, "scale is 'half': expected a number"),
    ({"blocks": 1.5}, "blocks has 1.5: expected numbers of blocks"), ({"gate": ""}, "unknown gate ''"),
    ({"gate": "shuffled", "seed": "a"}, "seed is 'a': expected a whole number"),
    ({"method": "dtr"}, "unknown method 'dtr': known: default, dmp"),
])
def test_what_there_is_not_is_one_line(given, said):
    model = model_with("dmp")
    usual = answer(model)
    with pytest.raises(BadInput, match=said), intervene(model, **given): pass
    assert torch.equal(answer(model), usual)


def test_a_model_without_methods_and_a_mask_without_prompts():
    with pytest.raises(BadInput, match="this DiT has no method on it"), intervene(tiny_dit()): pass
    with pytest.raises(BadInput, match="a mask has none"), intervene(model_with("dtr"), prompts=[0]): pass
