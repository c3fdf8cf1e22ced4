import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from diffusers import FlowMatchEulerDiscreteScheduler

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import PREDICTION_TYPES, WEIGHTINGS
from dmp_wb.diffusion.objectives import diffusion_losses, GaussianTables, make_tables, register_weighting
from dmp_wb.core.settings import SAMPLERS, ScheduleConfig, SCHEDULES
from dmp_wb.diffusion.schedules import betas, noise_schedule, sampler, snr, timestep_intervals

T_ALL = torch.tensor([0, 1, 50, 500, 998, 999])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1000, 400])
def test_betas_are_diffusers(schedule, T):
    assert torch.allclose(betas(schedule, T).float(), noise_schedule(schedule, T).betas, atol=2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_add_noise_is_diffusers(schedule):
    x0, noise = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    assert torch.allclose(GaussianTables(schedule).add_noise(x0, noise, T_ALL),
                          noise_schedule(schedule).add_noise(x0, noise, T_ALL), atol=1e-5)


def test_snr():
    bar = noise_schedule("linear").alphas_cumprod.double()
    assert torch.allclose(snr("linear").double(), bar / (1 - bar), rtol=5e-4)   # diffusers' table is float32
    assert torch.allclose(snr("linear"), GaussianTables("linear").snr, rtol=1e-6)
    with pytest.raises(BadInput, match="timestep 1000 is out of range: expected 0 to 999"):
        snr("linear", torch.tensor([0, 1000]))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_variational_term_by_definition(schedule):
    """The KL between two Gaussians and the discretised likelihood,
    from scipy and the definitions, sample by sample in float64."""
    g = torch.Generator().manual_seed(0)
    x0 = (torch.rand(6, 2, 3, 3, generator=g) * 2 - 1)
    x0[0, 0, 0, 0], x0[0, 0, 0, 1] = -1.0, 1.0
    noise, out = torch.randn(6, 2, 3, 3, generator=g), torch.randn(6, 4, 3, 3, generator=g) * 0.8
    got = diffusion_losses(out, x0, noise, T_ALL, schedule)
    b = betas(schedule)
    bar = (1 - b).cumprod(0)
    for n, t in enumerate(T_ALL.tolist()):
        x, e, eps, v = (z.double() for z in (x0[n], noise[n], out[n, :2], out[n, 2:]))
        prev = bar[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        x_t = bar[t].sqrt() * x + (1 - bar[t]).sqrt() * e
        guess = (x_t - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
        mean = lambda z: (b[t] * prev.sqrt() * z + (1 - prev) * (1 - b[t]).sqrt() * x_t) / (1 - bar[t])  # noqa: B023
        true_var = b[max(t, 1)] * (1 - bar[max(t, 1) - 1]) / (1 - bar[max(t, 1)])
        var = torch.exp((v + 1) / 2 * b[t].log() + (1 - (v + 1) / 2) * true_var.log())
        if t:
            want = 0.5 * (var.log() - true_var.log() + (true_var + (mean(x) - mean(guess)) ** 2) / var - 1)
            tolerance = 1e-4
        else:
            upper = torch.where(x > 0.999, torch.inf, x + 1 / 255)
            lower = torch.where(x < -0.999, -torch.inf, x - 1 / 255)
            p = norm.cdf(upper.numpy(), mean(guess), var.sqrt()) - norm.cdf(lower.numpy(), mean(guess), var.sqrt())
            want = -torch.tensor(p).clamp(min=1e-12).log()
            tolerance = 3e-2   # the code of the field approximates the normal cdf by a tanh
        assert math.isclose(got["vb"][n].item(), want.mean().item() / math.log(2), rel_tol=tolerance, abs_tol=1e-5), t
    assert torch.allclose(got["mse"], ((out[:, :2] - noise) ** 2).mean((1, 2, 3)))


@given(st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_weightings_by_definition(s):
    x, t = torch.tensor([s], dtype=torch.float64), torch.tensor([0])
    w = lambda name, target="epsilon": WEIGHTINGS[name](x, t, target).item()
    assert all(w("constant", target) == 1 for target in PREDICTION_TYPES)
    assert (math.isclose(w("min-snr"), min(s, 5) / s, rel_tol=1e-9)
            and math.isclose(w("min-snr", "sample"), min(s, 5), rel_tol=1e-9)
            and math.isclose(w("min-snr", "v_prediction"), min(s, 5) / (s + 1), rel_tol=1e-9))
    assert math.isclose(w("p2"), 1 / (1 + s), rel_tol=1e-9)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", ["min-snr", "p2"])
def test_one_error_weighs_the_same_whatever_is_predicted(target, weighting):
    "An error of the noise, said in terms of any target, costs the same."
    x0, noise, error = torch.rand(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4) * 0.1
    tables = make_tables("linear", target)
    t = torch.tensor([1, 50, 300, 500, 700, 950])
    a, b = tables.at("a", t, x0), tables.at("b", t, x0)
    wrong_noise = noise + error                                         # at the same x_t the image is then another
    wrong_x0 = (a * x0 + b * noise - b * wrong_noise) / a
    got = diffusion_losses(tables.target(wrong_x0, wrong_noise, t, target), x0, noise, t, tables, weighting,
                           target)["loss"]
    want = WEIGHTINGS[weighting](tables.snr[t], t, "epsilon") * error.square().mean((1, 2, 3))
    assert torch.allclose(got, want, rtol=2e-3)


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
def test_targets_are_diffusers(target):
    x0, noise, t = torch.rand(4, 2, 4, 4), torch.randn(4, 2, 4, 4), torch.tensor([0, 100, 600, 999])
    for schedule in ("linear", "cosine"):
        scheduler = noise_schedule(schedule)
        want = {"epsilon": noise, "sample": x0}.get(target, scheduler.get_velocity(x0, noise, t))
        assert torch.allclose(make_tables(schedule).target(x0, noise, t, target), want, atol=1e-4)


def test_the_variational_term_knows_what_is_predicted():
    x0, noise, t = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4), torch.tensor([0, 100, 600, 900])
    tables, v = make_tables("linear"), torch.rand(4, 1, 4, 4)
    vb = [diffusion_losses(torch.cat([tables.target(x0, noise, t, p), v], 1), x0, noise, t, tables,
                           prediction_type=p)["vb"] for p in ("epsilon", "sample", "v_prediction")]
    assert torch.allclose(vb[0], vb[1], rtol=1e-3, atol=1e-4) and torch.allclose(vb[0], vb[2], rtol=1e-3, atol=1e-4)
    with pytest.raises(BadInput, match="flow matching has no variance"):
        diffusion_losses(torch.zeros(4, 2, 4, 4), x0, noise, t, prediction_type="flow_prediction")


def test_flow_matching_is_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    tables, t = make_tables("linear", "flow_prediction"), torch.tensor([0, 499, 999])
    times = tables.model_timestep(t)
    assert times.tolist() == [1.0, 500.0, 1000.0] and all(float(v) in scheduler.timesteps.tolist() for v in times)
    x0, noise = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    assert torch.allclose(tables.add_noise(x0, noise, t), scheduler.scale_noise(x0, times, noise), atol=1e-5)


def test_a_weighting_of_your_own(monkeypatch):
    monkeypatch.setitem(WEIGHTINGS, "mine", None)
    register_weighting(
        "mine", lambda snr, timesteps, prediction_type: timesteps.float() * (2 if prediction_type == "sample" else 1))
    x, t = torch.ones(2, 1, 2, 2), torch.tensor([3, 7])
    assert (diffusion_losses(x, x * 0, x * 0, t, weighting="mine")["loss"].tolist() == [3, 7]
            and diffusion_losses(x, x * 0, x * 0, t, weighting="mine", prediction_type="sample")["loss"].tolist()
            == [6, 14])
    assert wb.load_experiment("digits-quick", ["objective.weighting=mine"]).objective.weighting == "mine"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_loss_is_weighted_mse_plus_vb(weighting):
    x0, noise, out = torch.rand(6, 1, 4, 4), torch.randn(6, 1, 4, 4), torch.randn(6, 2, 4, 4)
    losses = diffusion_losses(out, x0, noise, T_ALL, weighting=weighting)
    w = WEIGHTINGS[weighting](snr("linear", T_ALL), T_ALL, "epsilon")
    assert torch.allclose(losses["loss"], w * losses["mse"] + losses["vb"], rtol=1e-4)
    assert all(v.shape == (6,) for v in losses.values())
    fixed = diffusion_losses(out[:, :1], x0, noise, T_ALL, weighting=weighting)
    assert (fixed["vb"] == 0).all() and torch.equal(fixed["mse"], losses["mse"])


def test_bad_input():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(BadInput, match="did you mean 'min-snr'"):
        diffusion_losses(x, x, x, torch.tensor([0]), weighting="min_snr")
    with pytest.raises(BadInput, match="3 channels: expected 2, or 4"):
        diffusion_losses(torch.zeros(1, 3, 4, 4), x, x, torch.tensor([0]))
    with pytest.raises(BadInput, match="timestep -1 is out of range"): diffusion_losses(x, x, x, torch.tensor([-1]))
    with pytest.raises(BadInput, match="expected integers"): diffusion_losses(x, x, x, torch.tensor([0.5]))
    with pytest.raises(BadInput, match="did you mean 'cosine'"): noise_schedule("cosin")
    with pytest.raises(BadInput, match="num_train_timesteps is 0"): noise_schedule("linear", 0)
    with pytest.raises(BadInput, match="more than 20 steps"): noise_schedule("linear", 10)


@given(st.integers(1, 1000), st.data())
def test_intervals_cover_everything_once(T, data):
    k = data.draw(st.integers(1, T))
    pairs = timestep_intervals(T, k)
    assert [t for a, b in pairs for t in range(a, b + 1)] == list(range(T))
    sizes = [b - a + 1 for a, b in pairs]
    assert len(pairs) == k and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_share_the_forward_process(name):
    s = sampler(name, "cosine", 20, 500)
    if name == "flow-euler":   # the straight path has no betas
        assert s.timesteps[0] == 500 and len(s.timesteps) == 20
        return
    assert torch.allclose(s.alphas_cumprod.float(), noise_schedule("cosine", 500).alphas_cumprod, atol=1e-6)
    if name == "heun": s.timesteps = s.timesteps[::2]   # two calls a step, the second at the timestep of the next
    assert len(s.timesteps) == 20 and s.timesteps[0] >= 499 - 25 and (s.timesteps[1:] < s.timesteps[:-1]).all()


def test_schedule_config_is_a_schedule():
    assert torch.equal(noise_schedule(ScheduleConfig("cosine", 300)).betas, noise_schedule("cosine", 300).betas)
