"How much of a patch acts: its strength, several blended by weights, one exchanged for another in place."
import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import randomise, tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.base import facts_of, methods_of
from dmp_wb.methods.settings import LearnedMaskConfig, SwitchConfig, TLoRAConfig
from dmp_wb.methods.tlora import TimestepLoRA

ADDING = {
    "dmp": {"dmp": wb.DMPConfig()},
    "dmp of a condition, top 2, two blocks": {"dmp": wb.DMPConfig(gate_input="condition", top_k=2, depth=[0, 2])},
    "dmp, fewer prompts": {"dmp": wb.DMPConfig(num_prompts=5)},
    "prompt tuning": {"prompt-tuning": wb.DMPConfig(gate_input="none")},
    "tlora": {"tlora": TLoRAConfig()},
    "tlora, rank": {"tlora": TLoRAConfig(form="rank")},
}
T = torch.tensor([20, 150, 299, 300, 870])
LABELS = torch.tensor([0, 1, 2, 3, 10])
X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def with_methods(configs, **changes):
    model = tiny_dit(**changes)
    wb.apply_methods(model, configs)
    for method in methods_of(model).values():
        if isinstance(method, torch.nn.Module): randomise(method, 0.3)
    return model.eval(), next(iter(methods_of(model).values()))


def patched(seed=1, model=None, name="default", **settings):
    model = model or tiny_dit()
    return model, randomise(wb.patch(model, wb.DMPConfig(**settings), name).eval(), 0.5, seed)


@torch.no_grad()
def answer(model, t=T): return model(X.to(model.dtype), timestep=t, class_labels=LABELS).sample


def close(found, expected): torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def apart(a, b): return (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ADDING)
def test_one_is_the_method_and_zero_the_model_without_it_to_the_bit(name, dtype):
    model, method = with_methods(ADDING[name])
    model.to(dtype)
    plain, shared = tiny_dit().to(dtype), torch.tensor(300).expand(5)
    assert method.strength == 1
    for t in (T, shared):
        usual = answer(model, t)
        for strength, expected in ((0, answer(plain, t)), (1, usual)):
            method.strength = strength
            assert method.strength == strength and torch.equal(answer(model, t), expected)
    with method.prepared([300]):
        usual = answer(model, shared)
        method.strength = 0
        assert torch.equal(answer(model, shared), answer(plain, shared))
        method.strength = 1
        assert torch.equal(answer(model, shared), usual)


@pytest.mark.parametrize("name", ADDING)
def test_a_half_is_what_an_intervention_scaled_by_a_half_gives_and_the_two_multiply(name):
    model, method = with_methods(ADDING[name])
    usual = answer(model)
    with wb.intervene(model, scale=0.5): expected = answer(model)
    method.strength = np.float64(0.5)
    half = answer(model)
    close(half, expected)
    with wb.intervene(model, scale=2): close(answer(model), usual)
    with wb.intervene(model, timesteps=(100, 299)):   # off inside
        inside = (T >= 100) & (T < 300)
        assert torch.equal(answer(model), torch.where(inside[:, None, None, None], answer(tiny_dit()), half))
    assert torch.equal(answer(model), half) and apart(half, usual)
    method.strength = -2
    with wb.intervene(model, scale=-0.5): close(answer(model), usual)


def test_a_table_that_is_open_heeds_a_new_strength_and_gates_say_what_they_said():
    model, patch = patched()
    shared, gates = torch.tensor(300).expand(5), patch.gates(T)
    with patch.baked([300]):
        for strength in (0.5, 2, 0, 1):
            patch.strength = strength
            inside = answer(model, shared)
            with wb.intervene(model, scale=1): close(inside, answer(model, shared))   # which is not under the table
            assert torch.equal(patch.gates(T), gates)
    patch.strength = 0.5
    answer(model)
    torch.testing.assert_close(patch.last_gates, gates)


def test_samples_are_drawn_at_the_strength():
    model, patch = patched()
    draw = lambda m: wb.sample(m, 2, num_inference_steps=4, guidance_scale=2.0, class_labels=[1, 2], quiet=True)
    usual = draw(model)
    patch.strength = 0
    assert torch.equal(draw(model), draw(tiny_dit()))
    patch.strength = 0.5
    half = draw(model)
    patch.strength = 1
    assert torch.equal(draw(model), usual) and not torch.equal(half, usual)


# --- several, blended

def tokens_of_block(model, index, t=T):
    "What a block was given."
    seen = []
    handle = model.blocks[index].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try: answer(model, t)
    finally: handle.remove()
    return seen[0]


def test_a_block_gets_the_sum_of_what_each_patch_adds_times_its_weight():
    model, a = patched(1, name="a")
    _, b = patched(2, model, "b", gate_input="condition", top_k=3)
    patched(3, model, "c")
    wb.use_patches(model, "b", "a", weights=[-0.25, 0.7])
    assert (a.strength, b.strength, wb.get_patch(model, "c").enabled) == (0.7, -0.25, False)
    added = tokens_of_block(model, 0) - tokens_of_block(tiny_dit(), 0)
    naive = sum(w * p.gates(T, **given)[:, 0, :, None] * p.prompts[0]
                for w, p, given in ((0.7, a, {}), (-0.25, b, {"class_labels": LABELS})))
    close(added, naive)


def test_one_patch_of_weight_one_is_that_patch_and_weight_zero_leaves_one_out_to_the_bit():
    model, a = patched(1, name="a")
    only_a = answer(model)
    patched(2, model, "b")
    wb.use_patches(model, "b")
    only_b, plain = answer(model), answer(tiny_dit())
    for names, weights, expected in ((("a",), 1, only_a), (("a",), [1], only_a), (("a", "b"), (1, 0), only_a),
                                     (("a", "b"), torch.tensor([0, 1]), only_b), (("b", "a"), np.zeros(2), plain)):
        wb.use_patches(model, *names, weights=weights)
        assert torch.equal(answer(model), expected)
    wb.use_patches(model, "a", "b", weights=0.5)
    both = answer(model)
    wb.use_patches(model, "a")
    assert a.strength == 0.5
    wb.use_patches(model, "a", "b")
    assert torch.equal(answer(model), both) and apart(both, only_a)


def test_half_and_half_of_a_patch_is_that_patch():
    model, a = patched(1, name="a")
    usual = answer(model)
    patched(1, model, "b")
    wb.use_patches(model, "a", "b", weights=0.5)
    close(answer(model), usual)


def test_a_change_of_weights_is_seen_whole():
    model, _ = patched(1, name="a")
    patched(2, model, "b")
    want = []
    for weights in ((1, 0), (0, 1)):
        wb.use_patches(model, "a", "b", weights=weights)
        want.append(answer(model))
    failed, ready = [], threading.Barrier(3)

    def switch():
        for weights in ((1, 0), (0, 1)) * 30: wb.use_patches(model, "a", "b", weights=weights)

    def look():
        for _ in range(30):
            got = answer(model)
            assert any(torch.allclose(got, w, atol=1e-5) for w in want)

    def work(job):
        ready.wait()
        try: job()
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(job,)) for job in (switch, look, look)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed


# --- what cannot be

@pytest.mark.parametrize("names, weights, message", [
    (("a", "b"), [1], r"weights is \[1\]: expected 2 numbers, one for each of a, b"),
    (("a", "b"), [1, "x"], "the weight of b is 'x': expected a number"),
    (("a",), float("nan"), "the weight of a is nan: expected a number"),
    (("a",), True, "the weight of a is True: expected a number"),
    ((), [1], "weights is given without names"),
    (("a", "bee"), [1, 1], "did you mean 'b'"),
    (("a", "p"), [1, 0.5], "strength is 0.5 and mode is 'prepend': expected 0 or 1"),
])
def test_weights_that_make_no_sense_are_one_line_and_change_nothing(names, weights, message):
    model, _ = patched(1, name="a")
    patched(2, model, "b")
    patched(3, model, "p", mode="prepend", num_prompts=2)
    wb.use_patches(model, "b", weights=0.5)
    before = answer(model)
    with pytest.raises(BadInput, match=message) as said: wb.use_patches(model, *names, weights=weights)
    assert "\n" not in str(said.value) and torch.equal(answer(model), before)


@pytest.mark.parametrize("value", ["half", None, float("inf"), True, [1, 2]])
def test_a_strength_is_a_number(value):
    model, patch = patched()
    with pytest.raises(BadInput, match="strength is .*: expected a number"): patch.strength = value
    assert patch.strength == 1


def test_prepended_prompts_are_there_or_not():
    model, patch = patched(model=tiny_dit(num_layers=1), mode="prepend", num_prompts=3)
    usual, plain = answer(model), answer(tiny_dit(num_layers=1))
    with pytest.raises(BadInput, match="strength is 0.5 and mode is 'prepend'"): patch.strength = 0.5
    patch.strength = 0
    assert torch.equal(answer(model), plain)
    close(answer(torch.compile(model, backend="eager")), plain)
    patch.strength = 1
    assert torch.equal(answer(model), usual)


@pytest.mark.parametrize("name, config", [("dtr", wb.DTRConfig()), ("lmask", LearnedMaskConfig()),
                                          ("switch", SwitchConfig())])
def test_a_model_that_learned_with_its_masks_has_no_strength_of_them(name, config):
    model, method = with_methods({name: config})
    with pytest.raises(BadInput, match=f"strength is 0.5, and {name} is no adapter.*intervene"): method.strength = 0.5
    assert method.strength == 1


def test_a_patch_that_was_taken_off_has_no_strength():
    model, patch = patched()
    patch.strength = 0.5
    wb.unpatch(model)
    with pytest.raises(BadInput, match="the strength of patch default is set, and it is not on its model"):
        patch.strength = 0.7
    again = wb.patch(model)
    with pytest.raises(BadInput, match="not on its model"): patch.strength = 0.7
    assert patch.strength == again.strength == 1


# --- kept

def test_a_strength_is_saved_with_the_patch_and_travels_with_the_model(tmp_path):
    model, patch = patched()
    usual = answer(model)
    wb.save_patch(model, tmp_path / "whole")
    assert "strength" not in json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    facts = facts_of(model)
    patch.strength = 0.7
    half = answer(model)
    assert facts_of(model) != facts
    wb.save_patch(model, tmp_path / "some")
    assert json.loads((tmp_path / "some" / "adapter_config.json").read_text())["strength"] == 0.7
    assert "| `strength` | `0.7` |" in str(patch.generate_model_card())
    fresh = tiny_dit()
    assert wb.load_patch(fresh, tmp_path / "some").strength == 0.7 and torch.equal(answer(fresh), half)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert torch.equal(answer(other), half)
    patch.strength = 1
    assert facts_of(model) == facts and torch.equal(answer(model), usual)


def test_a_lora_is_saved_at_its_strength(tmp_path):
    model, lora = with_methods(ADDING["tlora"])
    lora.strength = 0.7
    lora.save(tmp_path / "lora")
    fresh = tiny_dit()
    assert TimestepLoRA.load(fresh, tmp_path / "lora").strength == 0.7
    assert torch.equal(answer(fresh), answer(model))


@pytest.mark.parametrize("settings, strength, message", [
    ({}, "much", "adapter_config.json: strength is 'much': expected a number"),
    ({"mode": "prepend", "num_prompts": 3}, 0.5, "adapter_config.json: strength is 0.5 and mode is 'prepend'")])
def test_a_file_with_a_strength_that_cannot_be_leaves_the_model_alone(tmp_path, settings, strength, message):
    model, _ = patched(**settings)
    wb.save_patch(model, tmp_path / "p")
    file = tmp_path / "p" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strength": strength}))
    fresh = tiny_dit()
    with pytest.raises(BadInput, match=message): wb.load_patch(fresh, tmp_path / "p")
    assert not methods_of(fresh)


# --- exchanged in place

def small(): return tiny_dit(num_layers=1)   # which is quickly compiled


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "Patches of a small DiT: two of equal settings, one of others, one at a strength."
    folder = tmp_path_factory.mktemp("patches")
    for name, seed, settings in (("one", 1, {}), ("two", 2, {}), ("few", 3, {"num_prompts": 4})):
        model, _ = patched(seed, small(), **settings)
        wb.save_patch(model, folder / name)
    model, patch = patched(4, small(), importance_weight=0.5)
    patch.strength = 0.3
    wb.save_patch(model, folder / "weak")
    return folder


@pytest.mark.parametrize("other", ["two", "weak"])
def test_exchanged_in_place_it_answers_as_taken_off_and_loaded(saved, other):
    model, fresh = small(), small()
    patch = wb.load_patch(model, saved / "one")
    parameters, expected = [*patch.parameters()], wb.load_patch(fresh, saved / other)
    assert wb.load_patch(model, saved / other, hotswap=True) is patch
    assert torch.equal(answer(model), answer(fresh)) and patch.strength == expected.strength
    assert all(a is b for a, b in zip(patch.parameters(), parameters, strict=True))
    assert patch.config == expected.config and facts_of(model) == facts_of(fresh)
    wb.load_patch(model, saved / "one", hotswap=True)
    assert patch.strength == 1


def test_inside_a_table_the_exchanged_patch_has_its_own_gates(saved):
    model, shared = small(), torch.tensor(300).expand(5)
    patch = wb.load_patch(model, saved / "one")
    with patch.baked([300]):
        wb.load_patch(model, saved / "two", hotswap=True)
        inside = answer(model, shared)
        fresh = small()
        wb.load_patch(fresh, saved / "two")
        assert torch.equal(inside, answer(fresh, shared))
        with patch.baked([300]): assert patch.tables.value is not None and torch.equal(answer(model, shared), inside)
    assert torch.equal(answer(model, shared), inside)


@pytest.mark.parametrize("folder, given, message", [
    ("few", {}, "num_prompts is 4, and None in the patch 'default': expected equal settings to exchange it in place"),
    ("two", {"dtype": torch.bfloat16}, "dtype is torch.bfloat16: expected None or torch.float32"),
    ("two", {"name": "other"}, "unknown patch 'other'"),
    ("none", {}, "no patch folder")])
def test_what_cannot_be_exchanged_leaves_the_patch_alone(saved, folder, given, message):
    model = small()
    wb.load_patch(model, saved / "one")
    before = answer(model)
    with pytest.raises(wb.BadInput, match=message):
        wb.load_patch(model, saved / folder, hotswap=True, **given)
    assert torch.equal(answer(model), before)


def test_there_must_be_one_to_exchange(saved):
    with pytest.raises(BadInput, match="is not patched"): wb.load_patch(small(), saved / "one", hotswap=True)


class Graphs:
    "A backend that counts what is compiled."
    def __init__(self): self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


def test_a_compiled_model_is_compiled_once_for_all_strengths_weights_and_exchanged_patches(saved):
    torch.compiler.reset()
    model, graphs = small(), Graphs()
    a, b = (wb.load_patch(model, saved / n, n) for n in ("one", "two"))
    usual = answer(model)
    compiled = torch.compile(model, backend=graphs)
    close(answer(compiled), usual)
    first = graphs.count
    wb.use_patches(model, "one", "two", weights=[1, 1])   # from here on a graph takes strengths as inputs
    close(answer(compiled), usual)
    once = graphs.count
    assert once <= 2 * first
    for weights in ((0.7, 0.3), (0, 1), (1, 0), (0, 0), (-1, 2)):
        wb.use_patches(compiled, "one", "two", weights=weights)
        close(answer(compiled), answer(model))
    a.strength = 0.4
    close(answer(compiled), answer(model))
    wb.load_patch(compiled, saved / "weak", "two", hotswap=True)
    assert b.strength == 0.3
    close(answer(compiled), answer(model))
    assert graphs.count == once


def test_strengths_in_a_compiled_loop_over_a_table(saved):
    torch.compiler.reset()
    model, graphs, shared = small(), Graphs(), torch.tensor(300).expand(5)
    patch = wb.load_patch(model, saved / "one")
    patch.strength = 1
    compiled = torch.compile(model, backend=graphs)
    counts = []
    for strength, folder in ((0.5, "one"), (0.7, "two"), (1, "one"), (0, "two")):
        wb.load_patch(compiled, saved / folder, hotswap=True)
        patch.strength = strength
        with patch.baked([300]): close(answer(compiled, shared), answer(model, shared))
        counts.append(graphs.count)
    assert len(set(counts)) == 1


def test_a_compiled_lora_is_compiled_once_for_all_strengths():
    torch.compiler.reset()
    model, lora = with_methods(ADDING["tlora"], num_layers=1)
    graphs, other = Graphs(), copy.deepcopy(lora.state_dict())
    lora.strength = 1
    compiled = torch.compile(model, backend=graphs)
    close(answer(compiled), answer(model))
    first = graphs.count
    for strength in (0.5, 0, 2):
        lora.strength = strength
        lora.load_state_dict({k: v * 0.5 for k, v in other.items()})
        close(answer(compiled), answer(model))
    assert graphs.count == first


def test_a_patch_whose_weights_are_elsewhere_is_not_exchanged(saved):
    model = small()
    wb.load_patch(model, saved / "one")
    usual = answer(model)
    cpu_offload(model)
    with pytest.raises(BadInput, match="the weights of the patch 'default' are offloaded or split"):
        wb.load_patch(model, saved / "two", hotswap=True)
    assert torch.equal(answer(model), usual)
    grouped = small()
    wb.load_patch(grouped, saved / "one")
    grouped.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(BadInput, match="offloaded or split"): wb.load_patch(grouped, saved / "two", hotswap=True)
