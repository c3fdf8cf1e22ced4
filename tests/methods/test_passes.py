"""A forward pass has its own state: in threads and tasks, after errors,
with weights that come late, with tokens that blocks do not see alike."""
import asyncio
import gc
import importlib
import math
import threading
import warnings
import weakref

import pytest
import torch
from accelerate import cpu_offload
from backbones import BACKBONES, INPUT_SIZE, inputs_for, output
from conftest import randomise, tiny_dit
from torch import nn

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.hooks import HOOKS_NAME


@torch.no_grad()
def at(model, t, batch=2):
    return model(torch.ones(batch, 1, 8, 8), timestep=torch.tensor(t), class_labels=torch.arange(batch)).sample


def together(*jobs, rounds=60):
    "Run each job again and again in a thread of its own, all at once; what they raise is raised here."
    failed, ready = [], threading.Barrier(len(jobs))

    def work(job):
        ready.wait()
        try:
            for _ in range(rounds): job()
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if failed: raise failed[0]


def both(**changes):
    "A DiT with a patch and a route."
    model = tiny_dit()
    randomise(wb.patch(model, **changes), 0.5)
    wb.route(model)
    return model


def test_threads_that_share_a_model_get_their_own_answers():
    model = both()
    want = {t: at(model, t) for t in (1, 500, 999)}

    def job(t): return lambda: torch.testing.assert_close(at(model, t), want[t])
    together(*map(job, want))


def test_what_a_pass_left_is_that_of_the_same_thread():
    model = both()
    p = wb.get_patch(model)
    want = {t: p.gates(t) for t in (1, 999)}
    balance = {t: float(p.balance_loss()) for t in want if at(model, t) is not None}

    def job(t):
        def once():
            at(model, t)
            torch.testing.assert_close(p.last_gates, want[t])
            assert float(p.balance_loss()) == balance[t]
        return once
    together(*map(job, want))
    fresh = both()
    thread = threading.Thread(target=at, args=(fresh, 999))
    thread.start()
    thread.join()
    torch.testing.assert_close(wb.get_patch(fresh).last_gates, want[999])   # this thread had no pass: the newest of all


def test_one_thread_samples_from_a_table_while_others_do_not_and_one_has_the_patch_off():
    model = tiny_dit()
    plain = at(model, 500)
    p = randomise(wb.patch(model), 0.5)
    patched = {t: at(model, t) for t in (500, 7)}
    assert not torch.allclose(plain, patched[500], atol=1e-3)

    def baked():
        with p.baked([500]):
            torch.testing.assert_close(at(model, 500), patched[500])
            with pytest.raises(BadInput, match="not in the baked table"): at(model, 7)

    def disabled():
        with wb.patch_disabled(model):
            torch.testing.assert_close(at(model, 500), plain)
            assert not p.enabled

    def neither():
        torch.testing.assert_close(at(model, 7), patched[7])
        assert p.enabled
    together(baked, disabled, neither)


def test_a_switch_of_patches_is_seen_whole():
    model = tiny_dit()
    for name, seed in (("a", 1), ("b", 2)): randomise(wb.patch(model, name=name), 0.5, seed)
    want = []
    for name in "ab":
        wb.use_patches(model, name)
        want.append(at(model, 500))

    def switch():
        wb.use_patches(model, "a")
        wb.use_patches(model, "b")

    def sample():
        got = at(model, 500)
        assert any(torch.allclose(got, w, atol=1e-5) for w in want)
    together(switch, sample, sample)


def test_threads_that_train_with_checkpointed_blocks():
    model = both().train()
    model.enable_gradient_checkpointing()
    prompts = wb.get_patch(model).prompts

    def gradient(t):
        out = model(torch.ones(2, 1, 8, 8), timestep=torch.tensor(t), class_labels=torch.tensor([1, 2])).sample
        return torch.autograd.grad(out.square().mean(), prompts)[0]
    want = {t: gradient(t) for t in (1, 999)}

    def job(t): return lambda: torch.testing.assert_close(gradient(t), want[t])
    together(*map(job, want), rounds=20)


def test_tasks_of_one_thread_and_the_threads_they_ask():
    model = tiny_dit()
    plain = at(model, 500)
    p = randomise(wb.patch(model), 0.5)
    patched = {t: at(model, t) for t in (500, 7)}

    async def off():
        with wb.patch_disabled(model):
            for _ in range(5):
                torch.testing.assert_close(at(model, 500), plain)
                torch.testing.assert_close(await asyncio.to_thread(at, model, 500), plain)
                await asyncio.sleep(0)

    async def on(table):
        for _ in range(5):
            if table:
                with p.baked([7]):
                    await asyncio.sleep(0)
                    torch.testing.assert_close(at(model, 7), patched[7])
            await asyncio.sleep(0)
            torch.testing.assert_close(at(model, 500), patched[500])

    async def main(): await asyncio.gather(off(), on(False), on(True))
    asyncio.run(main())


def test_streams_that_end_in_the_order_in_which_they_began():
    model = tiny_dit()
    p = randomise(wb.patch(model), 0.5)

    def stream(t):
        with p.baked([t]): yield at(model, t)
    first, second = stream(5), stream(6)
    next(first), next(second)
    first.close(), second.close()
    assert p.tables.value is None and at(model, 900) is not None


def test_a_model_that_calls_itself_within_a_block():
    model = both()
    want, inside, plain = at(model, 500), [], model.blocks[1].attn.forward

    def forward(*args, **kwargs):
        if not inside:
            inside.append(None)
            inside.append(at(model, 3))
        return plain(*args, **kwargs)
    model.blocks[1].attn.forward = forward
    assert torch.equal(at(model, 500), want) and torch.equal(inside[1], at(model, 3))


# --- passes that raise

class Boom(Exception): pass


PLACES = {
    "a hook of the model before ours": lambda m, f: m.register_forward_pre_hook(f, prepend=True),
    "a hook of the model after ours": lambda m, f: m.register_forward_pre_hook(f),
    "the first part": lambda m, f: m.x_embedder.register_forward_hook(f),
    "a hook of a block before ours": lambda m, f: m.blocks[1].register_forward_pre_hook(f, prepend=True),
    "a hook of a block after ours": lambda m, f: m.blocks[1].register_forward_pre_hook(f),
    "inside a block": lambda m, f: m.blocks[1].attn.register_forward_pre_hook(f),
    "a hook after a block": lambda m, f: m.blocks[1].register_forward_hook(f),
    "the head": lambda m, f: m.final_layer.register_forward_pre_hook(f),
    "a hook after the model": lambda m, f: m.register_forward_hook(f),
}


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_a_pass_that_raises_leaves_nothing(place, error):
    if place == "a hook of the model after ours" and error is KeyboardInterrupt:
        pytest.skip("before the first part is called, a pass lives on until the next")
    model = both()
    want, seen = at(model, 5), []

    def fail(*args): raise error
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])), prepend=True)
    model.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(weakref.ref(args[0])))
    handle = PLACES[place](model, fail)
    for grad in (False, True):
        try:
            with torch.set_grad_enabled(grad):
                model(torch.ones(2, 1, 8, 8), timestep=torch.tensor([3, 900]), class_labels=torch.tensor([1, 2]))
            raise AssertionError("it did not raise")
        except error: pass
        if error is KeyboardInterrupt: gc.collect()
        assert not any(ref() is not None for ref in seen) and getattr(model, HOOKS_NAME).call is None
        with pytest.raises(BadInput, match="was called alone"):
            model.blocks[0](torch.zeros(1, 16, 32), torch.zeros(1, 32))
    handle.remove()
    assert torch.equal(at(model, 5), want)


def test_an_operation_that_cannot_start_leaves_nothing():
    model = both()
    with wb.get_patch(model).baked([5]), pytest.raises(BadInput, match="not in the baked table"): at(model, 6)
    with pytest.raises(BadInput, match="without a timestep"): model(torch.ones(1, 1, 8, 8), timestep=None)
    with pytest.raises(BadInput, match="was called alone"): model.blocks[0](torch.zeros(1, 16, 32), torch.zeros(1, 32))


def test_the_pass_around_one_that_raises_goes_on():
    model = both()
    want = at(model, 500)

    def inner(*args):
        handle.remove()
        early = model.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(Boom), prepend=True)
        with pytest.raises(Boom): at(model, 3)
        early.remove()
        with pytest.raises(BadInput, match="without a timestep"): model(torch.ones(1, 1, 8, 8), timestep=None)
    handle = model.blocks[1].attn.register_forward_pre_hook(inner)
    assert torch.equal(at(model, 500), want)


def test_hooks_that_give_the_model_other_arguments():
    "accelerate's and FSDP's do: the pass must not end with the arguments it came with."
    model = both()
    want = at(model, 500)
    model.register_forward_pre_hook(lambda m, args, kwargs: (args, dict(kwargs)), with_kwargs=True)
    assert torch.equal(at(model, 500), want)
    handle = model.blocks[1].register_forward_hook(lambda *a: (_ for _ in ()).throw(Boom))
    with pytest.raises(Boom): at(model, 3)
    handle.remove()
    with pytest.raises(BadInput, match="was called alone"): model.blocks[0](torch.zeros(1, 16, 32), torch.zeros(1, 32))
    assert torch.equal(at(model, 500), want)


# --- weights that come late

def offloaded(model, kind, folder=None):
    "The model with its weights elsewhere until they are needed, by diffusers or by accelerate."
    if kind == "sequential": cpu_offload(model, "cpu", offload_buffers=True)
    else:
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                                   offload_type=kind,
                                   offload_to_disk_path=str(folder) if folder else None, **more)


@pytest.mark.parametrize("order", ["patched first", "offloaded first"])
@pytest.mark.parametrize("kind,disk",
                         [("block_level", True), ("leaf_level", True), ("leaf_level", False), ("sequential", False)])
@pytest.mark.parametrize("name,changes",
                         [("DiT", {}), ("DiT", {"gate_input": "condition"}), ("DiT", {"gate_input": "none"}),
                          ("SD3Transformer2DModel", {"mode": "prepend", "num_prompts": 3}),
                          ("UNet2DConditionModel-SD15", {}), ("FluxTransformer2DModel", {"gate_input": "condition"})])
def test_weights_that_are_loaded_as_they_are_called(name, changes, kind, disk, order, tmp_path):
    config, kwargs = wb.DMPConfig(input_size=INPUT_SIZE.get(name), **changes), inputs_for(name)
    model = BACKBONES[name]()
    p = randomise(wb.patch(model, config), 0.3)
    wb.route(model)
    want, gates = output(model, kwargs), p.last_gates
    wb.save_patch(model, tmp_path / "want")
    model = BACKBONES[name]()
    if order == "offloaded first": offloaded(model, kind, tmp_path / "disk" if disk else None)
    p = randomise(wb.patch(model, config), 0.3)
    wb.route(model)
    if order == "patched first": offloaded(model, kind, tmp_path / "disk" if disk else None)
    for _ in range(2): assert torch.equal(output(model, kwargs), want) and torch.equal(p.last_gates, gates)
    if config.gate_input == "timestep" and name == "DiT":
        torch.testing.assert_close(p.gates(kwargs["timestep"]), gates)
        with p.baked(kwargs["timestep"]): torch.testing.assert_close(output(model, kwargs), want)
    if kind != "sequential":   # there a state dict holds no numbers
        wb.save_patch(model, tmp_path / "got")
        assert ((tmp_path / "got" / "adapter_model.safetensors").read_bytes()
                == (tmp_path / "want" / "adapter_model.safetensors").read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("error")   # no fingerprint of numbers that are not there
            wb.load_patch(BACKBONES[name](), tmp_path / "got")
    if disk and order == "patched first":   # in memory lies what nobody has filled
        for parameter in model.parameters(): parameter.data.fill_(math.nan)
    wb.save_patch(model, tmp_path / "got")
    assert ((tmp_path / "got" / "adapter_model.safetensors").read_bytes()
            == (tmp_path / "want" / "adapter_model.safetensors").read_bytes())


@pytest.mark.parametrize("kind,disk",
                         [("block_level", True), ("leaf_level", True), ("leaf_level", False), ("sequential", False)])
def test_weights_that_are_elsewhere_are_not_taken_for_others(kind, disk, tmp_path, recwarn):
    model = BACKBONES["DiT"]()
    wb.patch(model, wb.DMPConfig())
    wb.save_patch(model, tmp_path / "patch")
    model = BACKBONES["DiT"]()
    offloaded(model, kind, tmp_path / "disk" if disk else None)
    if disk:
        for parameter in model.parameters(): parameter.data.fill_(math.nan)
    wb.load_patch(model, tmp_path / "patch")
    assert not [w for w in recwarn if "fingerprint" in str(w.message)]


def test_autocast_leaves_the_gates_in_float32():
    for name, changes in (("DiT", {}), ("DiT", {"gate_input": "condition", "noisy_gating": True, "top_k": 3}),
                          ("SD3Transformer2DModel", {"gate_input": "condition"})):
        model, kwargs = BACKBONES[name](), inputs_for(name)
        p = randomise(wb.patch(model, wb.DMPConfig(**changes)), 0.5)
        output(model, kwargs)
        want = p.last_gates
        low = {k: v.bfloat16() if k in ("pooled_projections", "encoder_hidden_states") else v
               for k, v in kwargs.items()}
        kwargs = kwargs if name == "DiT" else low | {"pooled_projections": kwargs["pooled_projections"]}
        with torch.autocast("cpu", torch.bfloat16):
            output(model, kwargs)
            assert torch.equal(p.last_gates, want) and p.last_gates.dtype == torch.float32
            if name == "DiT":
                torch.testing.assert_close(
                    p.gates(kwargs["timestep"], **{k: v for k, v in kwargs.items() if k == "class_labels" and changes}),
                    want, atol=1e-6, rtol=1e-5)
            output(model, low)   # a condition in half precision meets weights that are not


# --- tokens that blocks do not see alike

def sd3_with_prompts(depth=None, **more):
    "What SD3 answers with three prepended prompts, by the formula and by a patch."
    name = "SD3Transformer2DModel"
    model, kwargs = BACKBONES[name](), inputs_for(name) | more
    p = randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=3, depth=depth)), 0.3)
    got, gates = output(model, kwargs), p.last_gates
    wb.unpatch(model)
    left = {}
    for i, block in enumerate(model.transformer_blocks):
        plain = block.forward

        def forward(hidden_states, *args, i=i, plain=plain, **kw):   # the prompts enter and leave by hand
            if i in p.blocks: lead = gates[:, p.blocks.index(i), :, None] * p.prompts[p.blocks.index(i)]
            elif left: lead = left[max(left)]
            else: return plain(hidden_states, *args, **kw)
            text, x = plain(torch.cat([lead, hidden_states], 1), *args, **kw)
            left[i] = x[:, :3]
            return text, x[:, 3:]
        block.forward = forward
    return got, output(model, kwargs)


@pytest.mark.parametrize("depth", [None, 1, [1, 2], [2]])
@pytest.mark.parametrize("more", [{}, {"skip_layers": [0]}, {"skip_layers": [1]}, {"skip_layers": [2]},
                                  {"skip_layers": [0, 1, 2]},
                                  {"block_controlnet_hidden_states": [torch.ones(2, 16, 32)] * 3}], ids=str)
def test_prepended_prompts_where_blocks_are_skipped_or_a_controlnet_adds(depth, more):
    got, want = sd3_with_prompts(depth, **more)
    torch.testing.assert_close(got, want)


def test_prepended_prompts_in_checkpointed_blocks_beyond_the_depth():
    model, kwargs, grads = BACKBONES["DiT"]().train(), inputs_for("DiT"), []
    p = randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=3, depth=1)), 0.3)
    for on in (False, True):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        losses = [model(**inputs_for("DiT", timestep=t)).sample.square().mean() for t in (5, 900)]
        grads.append(torch.autograd.grad(sum(losses), [p.prompts, p.gate.weight]))
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b)
    assert kwargs and all(g.abs().sum() > 0 for g in grads[0])


class Joint(nn.Module):
    "As Lumina: every sample's text, as long as it is, then its image, then nothing."
    def __init__(self):
        super().__init__()
        self.time, self.layers = nn.Linear(1, 8), nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
                                                                for _ in range(2))

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask):
        lengths = encoder_attention_mask.sum(1).tolist()
        x = hidden_states.new_zeros(len(hidden_states), max(lengths) + 4, 8)
        for row, text, image, n in zip(x, encoder_hidden_states, hidden_states.flatten(2).mT, lengths):
            row[:n], row[n:n + 4] = text[:n], image
        pad = torch.arange(x.shape[1]) >= torch.tensor(lengths)[:, None] + 4
        for layer in self.layers: x = layer(x, src_key_padding_mask=pad)
        return torch.stack([row[n:n + 4] for row, n in zip(x, lengths)])


def joint(leading):
    wb.register_backbone(Joint, wb.Anatomy(blocks=lambda m: m.layers, grid_size=lambda m: (2, 2), width=lambda m: 8,
                                           embed_timestep=lambda m, t: m.time(t.float()[:, None] / 1000),
                                           embedding_width=lambda m: 8, leading_tokens=leading, tokens_argument="src",
                                           any_length=True))
    return randomise(Joint(), 0.3).eval()


@pytest.mark.parametrize("leading", [lambda m, i: [i["encoder_attention_mask"].sum(1)] * 2,
                                     lambda m, i: [i["encoder_attention_mask"].sum(1).tolist()] * 2])
def test_texts_of_different_lengths_before_the_images(leading):
    x, text, t, mask = (torch.randn(3, 8, 2, 2), torch.randn(3, 5, 8), torch.tensor([5, 400, 900]),
                        torch.tensor([[1, 1, 0, 0, 0], [1] * 5, [1, 1, 1, 0, 0]]))
    model = joint(leading)
    for prompts in (None, 2):
        randomise(wb.patch(model, wb.DMPConfig(num_prompts=prompts)), 0.5)
        wb.route(model)
        with torch.no_grad():
            together = model(x, t, text, mask)
            for i in range(3):
                torch.testing.assert_close(together[i:i + 1], model(
                    x[i:i + 1], t[i:i + 1], text[i:i + 1, :int(mask[i].sum())], mask[i:i + 1, :int(mask[i].sum())]))
        wb.unroute(wb.unpatch(model))
    wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=2))
    with pytest.raises(BadInput, match="texts of this batch have different lengths: expected equal ones"):
        model(x, t, text, mask)


def test_one_number_for_texts_that_a_mask_says_are_of_different_lengths():
    model = joint(lambda m, inputs: [int(inputs["encoder_attention_mask"].sum(1).max())] * 2)
    wb.patch(model)
    x, text, t = torch.randn(2, 8, 2, 2), torch.randn(2, 5, 8), torch.tensor([5, 400])
    model(x, t, text, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(BadInput,
                       match="lengths 2 and 5.*leading_tokens gives one number.*expected a number for each sample"):
        model(x, t, text, torch.tensor([[1, 1, 0, 0, 0], [1] * 5]))
    with pytest.raises(BadInput, match="gives 3 numbers for a block"): joint_of_three(model, x, t, text)


def joint_of_three(model, x, t, text):
    joint(lambda m, inputs: [[1, 2, 3]] * 2)
    return model(x, t, text, torch.ones(2, 5, dtype=torch.long))


class Listed(nn.Module):
    "As Z-Image: a list of images, one tensor each."
    def __init__(self):
        super().__init__()
        self.inp, self.time = nn.Linear(1, 8), nn.Linear(1, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def forward(self, x, t, captions):
        h = self.inp(torch.stack([i.flatten(1).T for i in x]))
        for layer in self.layers: h = layer(h)
        return list(h)


def test_images_given_as_a_list():
    wb.register_backbone(Listed, wb.Anatomy(blocks=lambda m: m.layers, grid_size=lambda m: (2, 2), width=lambda m: 8,
                                            embed_timestep=lambda m, t: m.time(t.float()[:, None] / 1000),
                                            embedding_width=lambda m: 8, timestep_argument="t", tokens_argument="src"))
    model = randomise(Listed(), 0.3)
    x, captions = torch.randn(3, 1, 2, 2), [torch.randn(5, 8), torch.randn(2, 8), torch.randn(3, 8)]
    for mode in (False, True):
        p = randomise(wb.patch(model.train(mode)), 0.5)
        assert len(model(list(x), torch.tensor([1, 500, 900]), captions)) == 3 and p.last_gates.shape == (3, 2, 4)
        model(list(x), 500, captions)
        assert len(p.last_gates) == (3 if mode else 1)
        with pytest.raises(BadInput, match="Listed was called without images: expected a tensor or a list of tensors"):
            model([], 500, [])
        wb.unpatch(model)


# --- DataParallel

def replicas(model, monkeypatch):
    "As DataParallel makes them, on the CPU."
    made = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(made, "_broadcast_coalesced_reshape",
                        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices])
    return made.replicate(model, [0, 1])


@pytest.mark.parametrize("name", ["DiT", "UNet2DConditionModel-SD15"])
def test_replicas_in_threads_heed_the_blocks_of_the_thread_that_made_them(name, monkeypatch):
    model, kwargs = BACKBONES[name](), {t: inputs_for(name, timestep=t) for t in (5, 900)}
    plain = {t: output(model, k) for t, k in kwargs.items()}
    p = randomise(wb.patch(model), 0.3)
    want = {t: output(model, k) for t, k in kwargs.items()}

    def all_of(want):
        def job(replica, t): return lambda: torch.testing.assert_close(output(replica, kwargs[t]), want[t])
        together(*(job(r, t) for r, t in zip(replicas(model, monkeypatch), kwargs)), rounds=5)
    all_of(want)
    assert any(torch.allclose(p.last_gates, p.gates(t), atol=1e-6) for t in kwargs)
    with wb.patch_disabled(model): all_of(plain)
    with p.baked([5]), pytest.raises(BadInput, match="not in the baked table"): all_of(want)
    with p.baked([5, 900]): all_of(want)
    output(model, kwargs[5])
    torch.testing.assert_close(p.last_gates, p.gates(5))


def test_gradients_and_the_balance_loss_of_replicas_reach_the_patch(monkeypatch):
    model = tiny_dit().train()
    p = randomise(wb.patch(model), 0.3)
    at(model, 5)   # this thread has had a pass of its own
    copies = replicas(model, monkeypatch)
    with torch.enable_grad():
        together(lambda: copies[0](torch.ones(2, 1, 8, 8), timestep=torch.tensor(900),
                                   class_labels=torch.tensor([1, 2])), rounds=1)
    p.balance_loss().backward()
    assert p.gate.weight.grad.abs().sum() > 0
