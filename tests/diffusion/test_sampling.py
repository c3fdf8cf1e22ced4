import math
import warnings

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_diffusers_dit, tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.seeds import seed_of
from dmp_wb.core.settings import PREDICTION_TYPES
from dmp_wb.diffusion.sampling import balanced_labels, guided
from dmp_wb.core.settings import SAMPLERS, SamplingConfig, ScheduleConfig, TrainedAs
from dmp_wb.diffusion.schedules import betas, noise_schedule, respace

FAST = dict(num_inference_steps=4, quiet=True)


def predicted(name): return {"prediction_type": "flow_prediction"} if name == "flow-euler" else {}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("out_channels", [1, 2])
def test_image_i_is_the_same_in_any_batch(name, out_channels):
    model = tiny_dit(out_channels=out_channels)
    draw = lambda **kw: wb.sample(model, sampler=name, **{"seed": 5, **FAST, **predicted(name), **kw})
    whole = draw(num_images=7, batch_size=7)
    assert (whole.shape == (7, 1, 8, 8) and whole.dtype == torch.float32 and whole.abs().max() <= 1
            and whole.isfinite().all())
    assert torch.allclose(whole, draw(num_images=7, batch_size=3), atol=1e-4)
    assert torch.allclose(whole[4:], draw(class_labels=[4, 5, 6], first=4), atol=1e-4)
    # the default labels go by the number of the image
    assert torch.allclose(whole[4:], draw(num_images=3, first=4), atol=1e-4)
    assert not torch.allclose(whole, draw(num_images=7, seed=6), atol=1e-2)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


class Oracle(torch.nn.Module):
    "Knows the one image there is, and so the exact noise in any x_t."
    def __init__(self, image, learned=False, target="epsilon"):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(()))
        self.image, self.learned, self.target = image, learned, target
        self.bar = noise_schedule("linear").alphas_cumprod
        self.config = type("C", (dict,), {"__getattr__": dict.__getitem__})(sample_size=8, in_channels=1,
                                                                            out_channels=1 + learned, num_classes=None)
    def forward(self, x, timestep):
        if self.target == "flow_prediction": a, b = 1 - timestep / 1000, timestep / 1000
        else: a, b = self.bar[timestep.long()].sqrt(), (1 - self.bar[timestep.long()]).sqrt()
        a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
        eps = (x - a * self.image) / b
        out = {"epsilon": eps, "sample": self.image.expand_as(x), "v_prediction": a * eps - b * self.image,
               "flow_prediction": eps - self.image}[self.target]
        return type("Out", (), {"sample": torch.cat([out, torch.zeros_like(out)], 1) if self.learned else out})


wb.register_backbone(Oracle, wb.Anatomy(*[None] * 5))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name,target", [(n, p) for n in SAMPLERS
                                         for p in PREDICTION_TYPES if (n == "flow-euler") == (p == "flow_prediction")])
def test_a_perfect_model_is_sampled_perfectly(name, target, learned):
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    drawn = wb.sample(Oracle(image, learned, target), 3, sampler=name, num_inference_steps=50, prediction_type=target,
                      quiet=True)
    assert (drawn - image).abs().max() < 0.02


def test_guidance_is_the_papers_formula(inputs):
    model, (x, _, _) = tiny_dit(out_channels=2), inputs
    y, t = torch.tensor([1, 2, 3, 4]), torch.tensor(400)
    with torch.no_grad():
        cond, free = model(x, t, y).sample, model(x, t, torch.full((4,), 10)).sample
        got = guided(model, x, t, {"class_labels": y}, {"class_labels": torch.tensor(10)}, 2.5)
        assert torch.allclose(got[:, :1], free[:, :1] + 2.5 * (cond[:, :1] - free[:, :1]), atol=1e-5)
        assert torch.allclose(got[:, 1:], cond[:, 1:], atol=1e-6)
        assert torch.allclose(guided(model, x, t, {"class_labels": y}, {}, 1.0), cond, atol=1e-6)
        assert torch.allclose(guided(model, x, t, {"class_labels": y}, {"class_labels": torch.tensor(10)}, 0.0)[:, :1],
                              free[:, :1], atol=1e-6)


def test_base_and_patched_start_from_the_same_noise():
    model = tiny_dit()
    before = wb.sample(model, 5, **FAST)
    p = wb.patch(model)
    assert torch.equal(wb.sample(model, 5, **FAST), before)
    randomise(p, 0.5)
    assert not torch.equal(wb.sample(model, 5, **FAST), before)
    wb.unpatch(model)
    assert torch.equal(wb.sample(model, 5, **FAST), before)


def test_unconditional_and_training_mode():
    model = tiny_dit(num_classes=None).train()
    assert wb.sample(model, 2, **FAST).shape == (2, 1, 8, 8) and model.training
    assert balanced_labels(5, None) is None and balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_diffusers_backbone_samples_too():
    assert wb.sample(tiny_diffusers_dit(), 2, **FAST).isfinite().all()


# --- the posterior

def papers_posterior(output, x, t, beta, clip):
    "Ho et al.'s equations 6 and 7 and Nichol & Dhariwal's equation 15, in float64, one sample at a time."
    bar, out = np.cumprod(1 - beta), []
    small = [beta[i] * (1 - (bar[i - 1] if i else 1)) / (1 - bar[i]) for i in range(len(beta))]
    for o, z, i in zip(output.double().numpy(), x.double().numpy(), t.tolist()):
        C, before = len(z), bar[i - 1] if i else 1.0
        x0 = (z - math.sqrt(1 - bar[i]) * o[:C]) / math.sqrt(bar[i])
        if clip: x0 = x0.clip(-1, 1)
        mean = (math.sqrt(before) * beta[i] / (1 - bar[i]) * x0
                + math.sqrt(1 - beta[i]) * (1 - before) / (1 - bar[i]) * z)
        share = (o[C:] + 1) / 2
        log = share * math.log(beta[i]) + (1 - share) * math.log(small[max(i, 1)]) if len(o) > C else np.full_like(
            z, math.log(beta[i] if i else small[1]))
        out.append((mean, log, x0))
    return [torch.tensor(np.stack(part)) for part in zip(*out)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", ScheduleConfig("linear", 250)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_posterior_is_the_papers(schedule, learned, clip, dtype):
    beta, g = betas(schedule).numpy(), torch.Generator().manual_seed(0)
    t = torch.tensor([0, 0, 1, 2, 10, len(beta) // 2, len(beta) - 2, len(beta) - 1])
    x, output = (torch.randn(8, 3, 5, 4, generator=g).to(dtype),
                 torch.randn(8, 6 if learned else 3, 5, 4, generator=g).to(dtype))
    got, want = wb.posterior(output, x, t, schedule, clip), papers_posterior(output, x, t, beta, clip)
    for a, b in zip(got, want):
        assert a.dtype == dtype and a.shape == x.shape
        assert torch.allclose(a.double(), b, rtol=1e-6 if dtype == torch.float32 else 1e-9,
                              atol=1e-6 if dtype == torch.float32 else 1e-9)


def test_posterior_at_every_timestep():
    g = torch.Generator().manual_seed(1)
    x, output, t = (torch.randn(1000, 1, 2, 2, generator=g).double(), torch.randn(1000, 2, 2, 2, generator=g).double(),
                    torch.arange(1000))
    for a, b in zip(wb.posterior(output, x, t), papers_posterior(output, x, t, betas().numpy(), False)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("wrong,match", [
    (dict(timesteps=torch.tensor([3, 1000])), "timestep 1000 is out of range"),
    (dict(timesteps=torch.tensor([-1, 0])), "timestep -1"), (dict(timesteps=torch.tensor(3)), "expected 2 integers"),
    (dict(timesteps=torch.tensor([1.0, 2.0])), "expected 2 integers"),
    (dict(timesteps=torch.tensor([1, 2, 3])), "expected 2 integers"),
    (dict(model_output=torch.zeros(2, 2, 4, 4)), "or that with 6 channels"),
    (dict(model_output=torch.zeros(1, 3, 4, 4)), "expected"), (dict(schedule="sine"), "unknown schedule"),
])
def test_posterior_refuses(wrong, match):
    with pytest.raises(BadInput, match=match):
        wb.posterior(**{**dict(model_output=torch.zeros(2, 3, 4, 4), x_t=torch.zeros(2, 3, 4, 4),
                               timesteps=torch.tensor([1, 2])), **wrong})


# --- ancestral sampling, respaced

def drawn_by_hand(model, steps, learned, seed=0, n=3):
    "The papers' respaced process in float64: betas of the kept ᾱ, the model asked at the original timesteps."
    full = np.cumprod(1 - betas().numpy())
    kept = respace(1000, steps)
    beta = 1 - full[kept] / np.concatenate([[1.0], full[kept][:-1]])
    streams = [torch.Generator().manual_seed(seed_of(seed, "image", i)) for i in range(n)]
    draw = lambda: torch.cat([torch.randn(1, 1, 8, 8, generator=s) for s in streams]).double()
    x = draw()
    for i in reversed(range(len(kept))):
        with torch.no_grad(): output = model(x.float(), torch.full((n,), kept[i]), torch.arange(n)).sample.double()
        mean, log, _ = papers_posterior(output, x, torch.full((n,), i), beta, False)
        x = mean + (0.5 * log).exp() * draw() if i else mean
    return x


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("steps", [250, 7, "4,9", "ddim10"])
def test_ddpm_is_the_papers_respaced_sampling(learned, steps):
    model = randomise(tiny_dit(out_channels=1 + learned), 0.15)
    got = wb.sample(model, 3, guidance_scale=1, sampler="ddpm", num_inference_steps=steps, clamp=False, quiet=True)
    want = drawn_by_hand(model, steps, learned)
    assert want.abs().max() > 0.5 and torch.allclose(got.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


# --- guidance

class Counting(torch.nn.Module):
    "Answers with its label and timestep, and notes what it was asked."
    def __init__(self, channels=4, learned=False):
        super().__init__()
        self.dummy, self.asked = torch.nn.Parameter(torch.zeros(())), []
        self.config = type("C", (dict,), {"__getattr__": dict.__getitem__})(
            sample_size=2, in_channels=channels, out_channels=channels * (1 + learned), num_classes=5)
    def forward(self, x, timestep, class_labels):
        self.asked.append((timestep[0].item(), class_labels.tolist()))
        out = 0.1 * x + 0.01 * class_labels.view(-1, 1, 1, 1)
        return type("Out", (),
                    {"sample": torch.cat([out, out.tanh()], 1) if self.config.out_channels > x.shape[1] else out})


wb.register_backbone(Counting, wb.Anatomy(*[None] * 5, num_classes=lambda m: m.config.num_classes))


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_interval_asks_once_outside(name):
    model = Counting()
    run = lambda **kw: wb.sample(model, class_labels=[1, 3], sampler=name, guidance_scale=3.0, num_inference_steps=9,
                                 quiet=True, clamp=False, **predicted(name), **kw)
    everywhere, nowhere = run(), run(guidance_interval=(0, 0)) if name == "flow-euler" else wb.sample(
        model, class_labels=[1, 3], sampler=name, guidance_scale=1.0, num_inference_steps=9, quiet=True, clamp=False)
    model.asked.clear()
    part = run(guidance_interval=(300, 700))
    times = [t for t, _ in model.asked]
    assert min(times) < 300 and max(times) > 700 and any(300 <= t <= 700 for t in times)
    assert all(labels == ([1, 3, 5, 5] if 300 <= t <= 700 else [1, 3]) for t, labels in model.asked)
    assert not torch.allclose(part, everywhere, atol=1e-4) and not torch.allclose(part, nowhere, atol=1e-4)
    assert torch.equal(run(guidance_interval=(0, 1000 if name == "flow-euler" else 999)), everywhere)
    edge = int(next((t for t in times if 300 <= t <= 700 and t == int(t)), times[0]))
    model.asked.clear()
    run(guidance_interval=(edge, edge))   # inclusive at both ends
    assert {t for t, labels in model.asked if len(labels) == 4} == {edge}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4, None])
def test_guidance_of_some_channels(learned, channels):
    model, x = Counting(4, learned), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    given, nulls, t = {"class_labels": torch.tensor([1, 3])}, {"class_labels": torch.tensor(5)}, torch.tensor(7)
    cond, free = model(x, t.expand(2), given["class_labels"]).sample, model(x, t.expand(2), torch.tensor([5, 5])).sample
    got, k = guided(model, x, t, given, nulls, 2.5, channels), channels or 4
    assert (torch.allclose(got[:, :k], free[:, :k] + 2.5 * (cond - free)[:, :k], atol=1e-6)
            and torch.equal(got[:, k:], cond[:, k:]))
    draw = lambda **kw: wb.sample(model, class_labels=[2, 2], guidance_scale=4.0, num_inference_steps=5, quiet=True,
                                  clamp=False, **kw)
    some, plain, all_ = draw(guidance_channels=channels), wb.sample(
        model, class_labels=[2, 2], guidance_scale=1.0, num_inference_steps=5, quiet=True, clamp=False), draw()
    assert torch.equal(some[:, k:], plain[:, k:]) and torch.equal(some[:, :k], all_[:, :k]) and not torch.allclose(
        some[:, :k], plain[:, :k], atol=1e-3)


def test_conditions_are_doubled_once_a_batch(monkeypatch):
    model, cat, whole = Counting(), torch.cat, []
    monkeypatch.setattr(torch, "cat",
                        lambda tensors, *a, **kw: (whole.append(1) if tensors[0].dtype == torch.long
                                                   and tensors[0].ndim == 1 else None, cat(tensors, *a, **kw))[1])
    wb.sample(model, class_labels=[0, 1, 2, 3], batch_size=2, num_inference_steps=6, quiet=True)
    assert len(whole) == 2


# --- trajectories

@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("learned", [False, True])
def test_a_walk_ends_where_sample_does(name, learned):
    model = tiny_dit(out_channels=1 + learned)
    settings = dict(sampler=name, num_inference_steps=5, seed=3, first=2, guidance_scale=2.0, **predicted(name))
    steps = list(wb.sample_trajectory(model, 4, **settings))
    calls = 9 if name == "heun" else 5
    assert [s.step for s in steps] == list(range(calls + 1)) and steps[-1].timestep == -1 and all(
        a.timestep >= b.timestep for a, b in zip(steps, steps[1:]))
    images = wb.sample(model, 4, quiet=True, clamp=False, **settings)
    assert torch.equal(steps[-1].x_t, images) and torch.equal(steps[-1].pred_x0, images) and all(
        s.x_t.shape == s.pred_x0.shape == images.shape for s in steps)
    again, path = wb.sample(model, 4, quiet=True, clamp=False, keep=list(range(calls + 1)), **settings)
    assert (torch.equal(again, images) and path.steps == list(range(calls + 1))
            and path.x_t.shape == (calls + 1, 4, 1, 8, 8) and path.x_t.device.type == "cpu")
    for k, s in enumerate(steps):
        assert (torch.equal(path.x_t[k], s.x_t) and torch.equal(path.pred_x0[k], s.pred_x0)
                and path.timesteps[k] == s.timestep)
    # at t = 0 the mean is the predicted x0
    if name == "ddpm": assert torch.allclose(steps[-2].pred_x0, images, atol=1e-5)


@pytest.mark.parametrize("name,target", [(n, p) for n in SAMPLERS
                                         for p in PREDICTION_TYPES if (n == "flow-euler") == (p == "flow_prediction")])
def test_a_perfect_model_predicts_the_image_from_the_start(name, target):
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    for s in wb.sample_trajectory(Oracle(image, target=target), 2, sampler=name, num_inference_steps=20,
                                  prediction_type=target):
        assert (s.pred_x0 - image).abs().max() < 0.02


def test_predicted_x0_is_the_posteriors():
    model = tiny_dit(out_channels=2)
    for s in wb.sample_trajectory(model, 2, guidance_scale=1.0, sampler="ddpm", num_inference_steps=10):
        if s.timestep < 0: break
        t = torch.full((2,), int(s.timestep))
        with torch.no_grad(): found = wb.posterior(model(s.x_t, t, torch.tensor([0, 1])).sample, s.x_t, t)[2]
        assert torch.allclose(found, s.pred_x0, rtol=1e-4, atol=1e-4 * found.abs().max().item())


def test_kept_steps():
    model, draw = tiny_dit(), lambda **kw: wb.sample(tiny_dit(), 5, num_inference_steps=8, quiet=True, **kw)
    images, path = draw(keep=3, batch_size=2)
    assert (path.steps == [0, 4, 8] and path.timesteps.tolist() == [999.0, 500.0, -1.0]
            and path.x_t.shape == (3, 5, 1, 8, 8) and images.shape == (5, 1, 8, 8))
    assert (torch.allclose(path.x_t[-1].clamp(-1, 1), images) and draw(keep=1)[1].steps == [8]
            and draw(keep=9)[1].steps == list(range(9)))
    assert draw(keep=[8, 0, 0])[1].steps == [0, 8] and torch.allclose(draw(keep=[2], batch_size=2)[1].x_t,
                                                                      draw(keep=[2])[1].x_t, atol=1e-5)
    assert torch.is_tensor(wb.sample(model, 1, num_inference_steps=2, quiet=True))


def test_between_steps_the_model_is_as_it_was():
    model = tiny_dit()
    p = randomise(wb.patch(model), 0.3)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([123])
    with torch.no_grad(): before = model(x, t, torch.tensor([1])).sample
    model.train()
    walk = wb.sample_trajectory(model, 2, num_inference_steps=4)
    for s in walk:
        assert model.training and p.training and torch.is_grad_enabled() and not s.pred_x0.requires_grad
        model.eval()
        # at a timestep that no table holds
        with torch.no_grad(): assert torch.equal(model(x, t, torch.tensor([1])).sample, before)
        model.train()
    walk = wb.sample_trajectory(model, 2, num_inference_steps=4)
    next(walk)
    walk.close()
    assert model.training
    model.eval()
    # baked and not
    assert torch.allclose(list(wb.sample_trajectory(model, 2, num_inference_steps=4))[-1].x_t,
                          wb.sample(model, 2, num_inference_steps=4, quiet=True, clamp=False), atol=1e-5)


def test_sample_bakes_once_and_leaves_no_table(monkeypatch):
    from dmp_wb.methods.dmp import PromptPatch
    model, made, baked = tiny_dit(), [], PromptPatch.baked
    randomise(wb.patch(model), 0.3)
    monkeypatch.setattr(PromptPatch, "baked", lambda self, t: (made.append(len(t)), baked(self, t))[1])
    for name in SAMPLERS:
        made.clear()
        wb.sample(model, 5, batch_size=2, sampler=name, **FAST, **predicted(name)) if name != "flow-euler" else None
        assert made == ([] if name == "flow-euler" else [7] if name == "heun" else [4])
    model(torch.zeros(1, 1, 8, 8), torch.tensor([77]), torch.tensor([0]))


@pytest.mark.parametrize("wrong,match", [
    (dict(class_labels=[10]), "class label 10"), (dict(guidance_scale=-1), "guidance_scale is -1"),
    (dict(sampler="huen"), "did you mean 'heun'"), (dict(num_images=0), "num_images is 0"),
    (dict(guidance_interval=(5, 1)), "lower one first"),
])
def test_a_walk_is_checked_before_its_first_step(wrong, match):
    with pytest.raises(BadInput, match=match): wb.sample_trajectory(tiny_dit(), **wrong)
    with pytest.raises(BadInput, match="unknown setting of sampling .batch_size"):
        wb.sample_trajectory(tiny_dit(), 2, batch_size=1)


@pytest.mark.parametrize("wrong,match", [
    (dict(guidance_scale=-0.5), "guidance_scale is -0.5: expected a number ≥ 0"),
    (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
    (dict(class_labels=[0, 10]), "class label 10 is out of range: expected integers 0 to 9"),
    (dict(class_labels=[-1]), "class label -1"),
    (dict(class_labels=[0.5]), "expected integers"),
    (dict(class_labels=[0, 1], num_images=3), "2 class_labels for 3 images"),
    (dict(num_images=0), "num_images is 0"), (dict(batch_size=0), "batch_size is 0"),
    (dict(sampler="dpm"), "did you mean 'ddpm'"),
    (dict(num_inference_steps=1001), "num_inference_steps is 1001: expected 1 to 1000"),
    (dict(schedule="sine"), "unknown schedule 'sine'"),
    (dict(guidance_scale=float("inf")), "guidance_scale is inf"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(num_inference_steps="10,20"), "only the sampler ddpm takes sections, dpmsolver\\+\\+ does not"),
    (dict(num_inference_steps="600,600", sampler="ddpm"), "at most 500 steps in section 1 of 2"),
    (dict(guidance_interval=(700, 200)), r"guidance_interval is \(700, 200\): .* lower one first"),
    (dict(guidance_interval=(-1, 200)), "timesteps 0 to 999"),
    (dict(guidance_interval=(0, 1000)), "timesteps 0 to 999"),
    (dict(guidance_channels=0), "guidance_channels is 0: expected 1 to 1"),
    (dict(guidance_channels=2), "guidance_channels is 2"),
    (dict(keep=0), "keep is 0: expected 1 to 26 steps"), (dict(keep=52), "keep is 52"),
    (dict(keep=[0, 51]), "keep has step 51: expected integers 0 to 25"), (dict(keep=[-1]), "keep has step -1"),
    (dict(keep=[]), "at least one step"), (dict(keep=[0.5]), "keep has step 0.5"),
])
def test_bad_input(wrong, match):
    model = tiny_dit().train()
    with pytest.raises(BadInput, match=match): wb.sample(model, **{"quiet": True, **wrong})
    assert model.training
    with pytest.raises(BadInput, match="unconditional"):
        wb.sample(tiny_dit(num_classes=None), class_labels=[1], quiet=True)


def test_numbers_of_numpy_and_torch_are_as_good():
    model, settings = tiny_dit(), dict(num_inference_steps=2, quiet=True)
    expected = wb.sample(model, 2, [1, 2], 1.5, seed=3, batch_size=2, **settings)
    for whole, real in ((np.int64, np.float32), (torch.tensor, torch.tensor)):
        found = wb.sample(model, whole(2), np.array([1, 2]), real(1.5), seed=whole(3), batch_size=whole(2),
                          num_inference_steps=np.int64(2), quiet=np.bool_(True))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("argument, wrong", [(k, v) for k, values in {
    "num_images": (2.0, "2", True, [2], float("nan")), "seed": (None, 1.5, "0", True),
    "guidance_scale": ("2", None, float("nan"), True, [1.5], 1 + 2j),
    "batch_size": ("8", 8.0, None, True), "first": (None, "0", 0.5, -1),
    "class_labels": ("ab", {"a": 1}, ["x"], [None], [True, False], [[1], [2, 3]], 1.5, [0.5, 1]),
    "sampler": (None, 3, ["ddim"]), "num_inference_steps": (2.0, True, {}), "schedule": (None, 3, ["linear"], {}),
    "prediction_type": (None, ["epsilon"], 3),
    "conditions": ([1], "text", {"encoder_hidden_states": torch.zeros(16, 2)}, {"class_labels": 3}),
    "null_conditions": ([1], {"class_labels": "x"}),
    "guidance_interval": (5, (1,), ("a", "b"), (1, None), "ab"), "guidance_channels": ("1", 1.0, True),
    "texts": ("a cat", ["a cat"]), "keep": ("2", 2.5, ["a"], [True]),
    "clamp": ("no", None, 1), "quiet": ("yes", 0), "model": ("digits-base", None)}.items() for v in values])
def test_an_argument_of_another_type_is_one_line(argument, wrong):
    given = dict(model=tiny_dit(), num_images=2, num_inference_steps=2, quiet=True) | {argument: wrong}
    if argument == "class_labels": del given["num_images"]
    with pytest.raises(BadInput) as e: wb.sample(**given)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    if argument not in ("clamp", "quiet", "keep", "batch_size"):
        with pytest.raises(BadInput): wb.sample_trajectory(**{k: v for k, v in given.items() if k != "quiet"})


def test_what_is_not_finite_is_said_with_its_reason():
    model = tiny_dit()
    with pytest.warns(UserWarning, match="image 0 is not finite: the model's answer is not from timestep 500 on, with "
                      "guidance_scale 1e\\+38"):
        wb.sample(model, 2, guidance_scale=1e38, num_inference_steps=2, quiet=True)
    with torch.no_grad(): model.final_layer.linear.weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="image 0 is not finite: the model's weights are not, expected a model whose "
                      "training has not diverged"):
        found = wb.sample(model, 2, num_inference_steps=2, quiet=True)
    assert found.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("sampler", ["dpmsolver++", "unipc", "heun"])
def test_as_many_steps_as_timesteps_are_finite(sampler):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert wb.sample(tiny_dit(), 1, sampler=sampler, num_inference_steps=30, schedule=ScheduleConfig("cosine", 30),
                         quiet=True).isfinite().all()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel,
                                  torch.optim.swa_utils.AveragedModel],
                         ids=["compile", "DataParallel", "AveragedModel"])
def test_wrapped_models_are_sampled(wrap):
    model, settings = tiny_dit(), dict(num_images=2, num_inference_steps=2, quiet=True)
    wb.patch(model, wb.DMPConfig(init="random"))
    expected = wb.sample(model, **settings)
    wrapped = wrap(model)
    assert torch.equal(wb.sample(wrapped, **settings), expected)
    walk = list(wb.sample_trajectory(wrapped, num_images=2, num_inference_steps=2))
    torch.testing.assert_close(walk[-1].x_t.clamp(-1, 1), expected)


def test_null_conditions_for_each_image(): # as one for all
    model = tiny_dit()
    given = dict(num_images=4, conditions={"class_labels": torch.tensor([1, 2, 3, 4])}, num_inference_steps=2,
                 batch_size=3, quiet=True)
    one = wb.sample(model, null_conditions={"class_labels": torch.tensor(10)}, **given)
    assert torch.equal(one, wb.sample(model, null_conditions={"class_labels": torch.full((4,), 10)}, **given))
    with pytest.raises(BadInput, match="null_conditions class_labels have shape"):
        wb.sample(model, null_conditions={"class_labels": torch.zeros(7)}, **given)


def test_a_model_of_a_run_is_sampled_as_it_was_trained_without_being_told():
    told = dict(schedule="cosine", prediction_type="v_prediction")
    model = wb.load_model("fashion-base", device="cpu")
    assert model.trained_as == TrainedAs(ScheduleConfig("cosine"), "v_prediction")
    drawn = wb.sample(model, 2, **FAST)
    assert drawn.equal(wb.sample(model, 2, **told, **FAST))
    assert drawn.equal(wb.sample(torch.optim.swa_utils.AveragedModel(model), 2, **FAST))
    # what is said comes first, one by one or as a whole
    linear = wb.sample(model, 2, schedule="linear", **FAST)
    assert not drawn.allclose(linear, atol=0.1)
    whole = SamplingConfig(num_inference_steps=4, schedule="linear", prediction_type="v_prediction")
    assert wb.sample(model, 2, config=whole, quiet=True).equal(linear)
    [*_, last] = wb.sample_trajectory(model, 2, num_inference_steps=4)
    assert drawn.equal(last.x_t.clamp(-1, 1))
    # the folder of the weights themselves, and a copy of them that has no run beside it
    inside = wb.load_model(wb.open_run("fashion-base").folder / "model", device="cpu")
    assert inside.trained_as == model.trained_as and not hasattr(model.from_config(model.config), "trained_as")


def test_a_model_of_flow_has_its_sampler_and_latents_are_not_cut_off():
    model = tiny_dit()
    with torch.no_grad(): model.final_layer.linear.bias.fill_(3.0)
    assert float(wb.sample(model, 2, prediction_type="sample", **FAST).max()) == 1
    model.trained_as = TrainedAs(ScheduleConfig(), "sample", latents=True)
    assert float(wb.sample(model, 2, **FAST).max()) > 2.5
    assert float(wb.sample(model, 2, clamp=True, **FAST).max()) == 1
    model.trained_as = TrainedAs(ScheduleConfig(), "flow_prediction")
    flow = wb.sample(model, 2, sampler="flow-euler", **FAST)
    for known in ({}, {"preset": "fast"}): assert wb.sample(model, 2, **known, **FAST, guidance_scale=1.5).equal(flow)


def test_each_image_may_have_a_seed_of_its_own():
    model = tiny_dit()
    draw = lambda **settings: wb.sample(model, num_inference_steps=3, quiet=True, **settings)
    both = draw(class_labels=[1, 2, 2], seeds=[5, 5, 8])
    for i, (label, seed) in enumerate(((1, 5), (2, 5), (2, 8))):
        assert torch.allclose(both[i], draw(class_labels=[label], seed=seed)[0], atol=1e-5)
    with pytest.raises(BadInput, match="2 seeds for 3 images: expected as many"):
        draw(class_labels=[1, 2, 2], seeds=[5, 5])
    with pytest.raises(BadInput, match="seeds are 5: expected a whole number for each image"):
        draw(class_labels=[1], seeds=5)
