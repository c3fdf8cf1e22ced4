"Respacing, and the samplers that walk on it."
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import SAMPLERS, ScheduleConfig
from dmp_wb.diffusion.schedules import betas, noise_schedule, respace, sampler


def test_figures_worked_out_by_hand():
    # stride 999/249
    assert respace(1000, 250)[:8] == [0, 4, 8, 12, 16, 20, 24, 28] and respace(1000, 250)[-2:] == [995, 999]
    assert respace(10, 4) == respace(10, "4") == respace(10, [4]) == [0, 3, 6, 9]
    assert respace(10, 3) == [0, 4, 9]                  # 4.5 is rounded to even, as Python does
    assert respace(8, 3) == [0, 4, 7]                   # and so is 3.5
    assert respace(12, "2,1,4") == [0, 3, 4, 8, 9, 10, 11]
    assert respace(11, "2,2,2") == [0, 3, 4, 7, 8, 10]  # sections of 4, 4 and 3
    assert respace(300, "10,15,20")[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert respace(1000, "ddim50") == list(range(0, 1000, 20)) and respace(1000, "ddim250") == list(range(0, 1000, 4))
    assert (respace(10, "ddim4") == [0, 3, 6, 9] and respace(10, "ddim5") == [0, 2, 4, 6, 8]
            and respace(1000, "ddim1000") == list(range(1000)))
    assert respace(1000, "ddim334") == list(range(0, 1000, 3))
    assert respace(1000, 21)[10] == 499                 # 49.95 added ten times is a little less than 499.5
    assert respace(1000, 1) == [0] and respace(1, 1) == [0] and wb.respace is respace
    assert respace(1000, np.int64(5)) == respace(1000, 5) and all(type(t) is int for t in respace(1000, np.int64(5)))


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 1200), st.data())
def test_every_section_is_spread_from_end_to_end(T, data):
    k = data.draw(st.integers(1, min(T, 6)))
    sizes = [T // k + (i < T % k) for i in range(k)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    kept, start = respace(T, ",".join(map(str, counts))), 0
    assert len(kept) == sum(counts) and all(a < b for a, b in zip(kept, kept[1:]))
    for size, n in zip(sizes, counts):
        mine, kept = kept[:n], kept[n:]
        assert mine[0] == start and (n == 1 or mine[-1] == start + size - 1)
        exact = [start + Fraction(i * (size - 1), max(n - 1, 1)) for i in range(n)]
        assert all(abs(t - x) <= Fraction(1, 2) + Fraction(1, 10**9) for t, x in zip(mine, exact))
        start += size


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 1200), st.data())
def test_whole_strides(T, data):
    stride = data.draw(st.integers(1, T - 1))
    n = -(-T // stride)
    kept = respace(T, f"ddim{n}")
    step = kept[1] - kept[0]
    assert kept == list(range(0, T, step)) and len(kept) == n and step <= stride and (step == 1
                                                                                      or -(-T // (step - 1)) != n)


@pytest.mark.parametrize("T,steps,match", [
    (1000, 0, "steps is 0"), (1000, -3, "steps is -3"), (1000, 1001, "at most 1000 steps in section 1 of 1"),
    (1000, "300,400,300", "at most 333 steps in section 2 of 3"), (1000, "10,,20", "at least 1, as 250"),
    (1000, "", "steps is ''"), (1000, [], "at least one section"), (1000, 2.5, "steps is 2.5"),
    (1000, True, "steps is True"), (1000, None, "steps is None"), (1000, "10;20", "10;20"),
    (1000, "ddim", "ddim"), (1000, "ddim400", "whole stride"), (1000, "ddim1001", "whole stride"),
    (1000, "ddim1", "whole stride"), (1000, "ddim-5", "ddim-5"), (1000, "ddim0", "ddim0"),
    (0, 1, "num_train_timesteps is 0"),
    (3, [1, 1, 1, 1], "at most 0 steps in section 4"), (1000, ["a"], "steps is"),
])
def test_impossible_counts(T, steps, match):
    with pytest.raises(BadInput, match=match) as e: respace(T, steps)
    assert "\n" not in str(e.value) and "expected" in str(e.value)


@pytest.mark.parametrize("steps", [1, 7, 250, "10,15,20", "ddim25", [3, 2]])
def test_ddpm_walks_on_respaced_timesteps(steps):
    assert sampler("ddpm", "cosine", steps, 600).timesteps.tolist() == respace(600, steps)[::-1]


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "ddpm"])
def test_the_others_take_a_number(name):
    for n in (1, 2, 12, np.int64(30), 333, 600, 999):
        t = sampler(name, num_inference_steps=n).timesteps
        assert len(t) == (2 * n - 1 if name == "heun" else n) and t.min() >= 0 and (t[1:] <= t[:-1]).all()
    with pytest.raises(BadInput, match="only the sampler ddpm takes sections"):
        sampler(name, num_inference_steps="10,20")


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_no_sampler_visits_a_timestep_twice(name):
    counts = {3: range(1, 4), 21: range(1, 22), 37: range(1, 38), 1000: (1, 61, 223, 485, 926, 994, 998, 999, 1000)}
    for T in counts:
        for steps in counts[T]:
            scheduler = sampler(name, "cosine", steps, T)
            t = scheduler.timesteps
            t = torch.cat([t[:1], t[1::2]]) if name == "heun" else t   # heun looks twice at each but the first
            assert len(t) == len(t.unique()) == steps and t.min() >= 0, (T, steps)
            if hasattr(scheduler, "sigmas"): assert scheduler.sigmas.isfinite().all()


def test_settings_that_would_visit_a_timestep_twice_are_refused():
    with pytest.raises(BadInput, match="num_inference_steps is 1000: expected fewer"):
        sampler("unipc", "linear", 1000, timestep_spacing="linspace")
    for wrong in (True, 50.0, None, "x"):
        with pytest.raises(BadInput, match="num_inference_steps is"): sampler("ddim", "linear", wrong)


@pytest.mark.parametrize("schedule", ["linear", "cosine", ScheduleConfig("linear", 400)])
@pytest.mark.parametrize("steps", [10, 250, "5,20,40"])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_ddpm_is_the_respaced_process_in_float64(schedule, steps, variance):
    "Against betas that are recomputed from the kept ᾱ, one step from every kept timestep, in double precision."
    bar = np.cumprod(1 - betas(schedule).numpy())
    kept = respace(len(bar), steps)
    beta = 1 - bar[kept] / np.concatenate([[1.0], bar[kept][:-1]])
    new_bar = np.cumprod(1 - beta)
    assert np.allclose(new_bar, bar[kept], rtol=1e-10)
    before = np.concatenate([[1.0], new_bar[:-1]])
    small = beta * (1 - before) / (1 - new_bar)
    scheduler, g = sampler("ddpm", schedule, steps, variance_type=variance), torch.Generator().manual_seed(0)
    for i, t in reversed(list(enumerate(kept))):
        x, eps, v = torch.randn(3, 2, 1, 4, 4, generator=g, dtype=torch.float64)
        v = v.clamp(-2.5, 2.5) / 2.5
        x0 = (x - (1 - new_bar[i])**0.5 * eps) / new_bar[i]**0.5
        mean = (beta[i] * before[i]**0.5 / (1 - new_bar[i]) * x0
                + (1 - before[i]) * (1 - beta[i])**0.5 / (1 - new_bar[i]) * x)
        if i == 0: want = mean
        else:
            log = {"fixed_large": np.log(beta[i]), "fixed_small": np.log(small[i]),
                   "learned_range": (v + 1) / 2 * np.log(beta[i]) + (1 - (v + 1) / 2) * np.log(small[i])}[variance]
            noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            want = mean + torch.exp(0.5 * torch.as_tensor(log)) * noise
        output = torch.cat([eps, v], 1) if variance == "learned_range" else eps
        got = scheduler.step(output, torch.tensor(t), x, generator=torch.Generator().manual_seed(t))
        assert torch.allclose(got.prev_sample, want, rtol=1e-9, atol=1e-9) and torch.allclose(got.pred_original_sample,
                                                                                              x0, rtol=1e-9, atol=1e-9)


def test_float32_tables_would_not_do():
    "What diffusers' own table loses; if this fails, the float64 table in `sampler` can go."
    from diffusers import DDPMScheduler
    theirs, ours = (DDPMScheduler(1000, beta_end=0.02, clip_sample=False, variance_type="fixed_large"),
                    sampler("ddpm", num_inference_steps=1000))
    theirs.set_timesteps(timesteps=list(range(1000))[::-1])
    exact = betas()
    worst = lambda s: max(abs(float(s._get_variance(torch.tensor(t))) / exact[t].item() - 1) for t in range(1, 1000))
    assert worst(ours) < 1e-12 and worst(theirs) > 1e-4


def test_clean_table_leaves_the_config_alone():
    assert sampler("ddpm", "cosine", 10).config.beta_schedule == noise_schedule("cosine").config.beta_schedule


@pytest.mark.parametrize("schedule", ["linear", ScheduleConfig("cosine", 300)])
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 61, 122, 200, 299])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_to_its_next_timestep(kind, steps, schedule):
    "Song et al.'s equation 12 without noise, in float64, whether or not the number of steps divides T."
    s, g = sampler("ddim", schedule, steps, prediction_type=kind), torch.Generator().manual_seed(0)
    bar, times = (1 - betas(schedule)).cumprod(0), s.timesteps.tolist()
    T, x = len(bar), torch.randn(1, 1, 4, 4, generator=g)
    assert len(times) == steps and times[0] == T - 1 and all(abs(a - b - T / steps) <= 1
                                                             for a, b in zip(times, [*times[1:], -1]))
    want = x.double()
    for t, after in zip(times, [*times[1:], -1]):
        a, b, to = bar[t].sqrt(), (1 - bar[t]).sqrt(), bar[after] if after >= 0 else torch.tensor(1.0).double()
        output = torch.randn(1, 1, 4, 4, generator=g) * 0.5
        o = output.double()
        eps, x0 = {"epsilon": (o, (want - b * o) / a), "sample": ((want - a * o) / b, o),
                   "v_prediction": (a * o + b * want, a * want - b * o)}[kind]
        want = to.sqrt() * x0 + (1 - to).sqrt() * eps
        x = s.step(output, torch.tensor(t), x).prev_sample
    assert torch.allclose(x.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
