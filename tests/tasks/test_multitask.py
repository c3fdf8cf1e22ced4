import itertools
import math

import pytest
import torch
from conftest import tiny_dit
from hypothesis import given, settings
from hypothesis import strategies as st

import dmp_wb as wb
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.data.load import load_data
from dmp_wb.core.settings import aggregators
from dmp_wb.tasks.affinity import (
    gate_similarity, load_affinity, mask_overlap, save_affinity, spread_affinity, task_affinity,
)
from dmp_wb.tasks.intervals import balanced_timesteps, interval_losses, interval_of
from dmp_wb.tasks.weighting import balanced_backward, make_aggregator, UncertaintyWeighting
from dmp_wb.diffusion.schedules import timestep_intervals


def cost(values, first, last):
    "One interval, as the paper writes it."
    if first == last: return 0.0 if values.ndim == 1 else -values[first, first].item()
    centre = round((first + last + 1) / 2)
    if values.ndim == 1: return sum(abs(values[t].item() - values[centre].item()) for t in range(first, last + 1))
    return -sum(values[centre, t].item() for t in range(first, last + 1))


def exhaustive(values, k):
    best = math.inf
    for bounds in itertools.combinations(range(1, len(values)), k - 1):
        edges = [0, *bounds, len(values)]
        best = min(best, sum(cost(values, a, b - 1) for a, b in itertools.pairwise(edges)))
    return best


@given(st.integers(1, 9).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))), st.integers(0, 10**6),
       st.booleans())
@settings(max_examples=120, deadline=None)
def test_clusters_equal_exhaustive_search(size, seed, affinity):
    T, k = size
    values = torch.randn(*((T, T) if affinity else (T,)), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.float64)
    clusters = wb.timestep_clusters(values, k)
    assert len(clusters) == k and clusters[0][0] == 0 and clusters[-1][1] == T - 1
    assert all(a <= b for a, b in clusters) and all(y[0] == x[1] + 1 for x, y in itertools.pairwise(clusters))
    assert sum(cost(values, *c) for c in clusters) == pytest.approx(exhaustive(values, k), abs=1e-9)


def test_clusters_of_plain_lists_and_numpy():
    assert wb.timestep_clusters([0, 0, 0, 9, 9, 9], 2) == [(0, 2), (3, 5)] == wb.timestep_clusters(
        torch.tensor([0, 0, 0, 9, 9, 9]).numpy(), 2)
    assert wb.timestep_clusters([5.0], 1) == [(0, 0)]


@pytest.mark.parametrize("values,k,match",
                         [([1, 2, 3], 0, "k is 0: expected 1 to 3"), ([1, 2, 3], 4, "k is 4"),
                          ([1, 2, 3], 2.0, "k is 2.0"), ([], 1, "shape"), ([[1, 2, 3]], 1, r"\(1, 3\)"),
                          ([1, float("nan")], 1, "NaN")])
def test_bad_clusters(values, k, match):
    with pytest.raises(BadInput, match=match): wb.timestep_clusters(values, k)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_balanced_timesteps(batch, k, seed):
    clusters = timestep_intervals(50, k)
    t = balanced_timesteps(batch, clusters, torch.Generator().manual_seed(seed))
    counts = torch.bincount(interval_of(t, clusters), minlength=k)
    assert t.dtype == torch.int64 and counts.max() - counts.min() <= 1 and counts.sum() == batch
    assert all(first <= v <= last for v, (first, last) in zip(t.tolist(), [clusters[i % k] for i in range(batch)]))


def test_balanced_timesteps_are_uniform_inside_an_interval():
    t = balanced_timesteps(30_000, [(0, 4), (5, 9), (10, 29)], torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=30)
    assert (counts[:10] - 2000).abs().max() < 5 * 2000**0.5 and (counts[10:] - 500).abs().max() < 5 * 500**0.5


def test_uncertainty_weighting():
    clusters = [(0, 2), (3, 9)]
    losses, t = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 2, 9])
    per = interval_losses(losses, t, clusters)
    assert per.tolist() == [1.0, 2.5] and interval_losses(losses[:2], t[:2], clusters).tolist() == [1.0, 0.0]
    uw = UncertaintyWeighting(2)
    with torch.no_grad(): uw.s.copy_(torch.tensor([0.5, -1.0]))
    want = 0.5 * (math.exp(-0.5) * 1.0 + 0.5) + 0.5 * (math.exp(1.0) * 2.5 - 1.0)
    assert uw(per).item() == pytest.approx(want, rel=1e-6)
    uw(per).backward()
    assert uw.s.grad.tolist() == pytest.approx([0.5 * (1 - math.exp(-0.5)), 0.5 * (1 - math.exp(1.0) * 2.5)], rel=1e-5)


def test_aggregators():
    assert {"PCGrad", "NashMTL", "UPGrad", "MGDA", "Mean"} <= set(aggregators())
    with pytest.raises(BadInput, match="did you mean 'PCGrad'"): make_aggregator("PCgrad", 2)
    w, unused = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(2))
    a, b = torch.tensor([1.0, 0, 0, 1]), torch.tensor([-1.0, 1, 0, 0])
    balanced_backward(torch.stack([w @ a, w @ b]), [w, unused], make_aggregator("PCGrad", 2))
    project = lambda g, h: g - min(0.0, float(g @ h)) / float(h @ h) * h
    assert torch.allclose(w.grad, project(a, b) + project(b, a), atol=1e-6) and (unused.grad == 0).all()
    w.grad = None
    balanced_backward(torch.stack([w @ a, w @ b]), [w], make_aggregator("Mean", 2), reduce=lambda j: 2 * j)
    assert torch.allclose(w.grad, a + b)


def affinity_by_hand(model, x0, labels, clusters, seed=0):
    "Autograd of every group's loss, all gradients kept."
    from dmp_wb.core.seeds import seed_of
    from dmp_wb.diffusion.objectives import diffusion_losses, GaussianTables
    tables, rows = GaussianTables("linear"), []
    for first, last in clusters:
        g = torch.Generator().manual_seed(seed_of(seed, "affinity", 0))
        noise = torch.randn(x0.shape, generator=g)
        t = (first + torch.rand(len(x0), generator=g) * (last - first + 1)).long()
        out = model(tables.add_noise(x0, noise, t), t, labels).sample
        grads = torch.autograd.grad(diffusion_losses(out, x0, noise, t, tables)["mse"].mean(), list(model.parameters()))
        rows.append(torch.cat([v.flatten() for v in grads]))
    return torch.nn.functional.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1)


def test_task_affinity():
    model, data = tiny_dit().train(), load_data("digits").batch(torch.arange(24))
    clusters = timestep_intervals(1000, 5)
    model.x_embedder.proj.weight.grad = torch.ones_like(model.x_embedder.proj.weight)
    args = (model, data["images"], data["class_labels"], clusters)
    got = task_affinity(*args, quiet=True)
    want = affinity_by_hand(model, data["images"], data["class_labels"], clusters)
    assert (torch.allclose(got, want, atol=1e-5) and torch.allclose(got.diagonal(), torch.ones(5), atol=1e-5)
            and got.min() < 0.9)
    # as it was
    assert (model.training and (model.x_embedder.proj.weight.grad == 1).all()
            and model.blocks[0].mlp.fc1.weight.grad is None)
    sketched = task_affinity(*args, memory=1e-6, quiet=True)                  # 1,024 buckets for 60,000 entries
    assert not torch.equal(sketched, got) and (sketched - got).abs().max() < 5 / 1024**0.5
    assert torch.equal(sketched, task_affinity(*args, memory=1e-6, quiet=True))
    finer = task_affinity(*args, memory=5 * 8 * 16384 / 2**30, quiet=True)
    assert (finer - got).abs().max() < 5 / 16384**0.5
    with pytest.raises(BadInput, match="unknown setting 'batchsize': did you mean 'batch_size'"):
        task_affinity(*args, batchsize=2)
    with pytest.raises(BadInput, match="requires a gradient"):
        task_affinity(tiny_dit().requires_grad_(False), data["images"], quiet=True)


def test_affinity_files(tmp_path):
    clusters, a = [(0, 1), (2, 5)], torch.tensor([[1.0, 0.2], [0.2, 1.0]])
    save_affinity(tmp_path / "a.safetensors", a, clusters, run="digits")
    got, found, facts = load_affinity(tmp_path / "a.safetensors")
    assert torch.equal(got, a) and found == clusters and facts == {"run": "digits"}
    wide = spread_affinity(a, clusters)
    assert (wide.shape == (6, 6) and wide[0, 1] == 1 and wide[1, 2] == pytest.approx(0.2)
            and wb.timestep_clusters(wide, 2) == clusters)
    (tmp_path / "torn").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    with pytest.raises(BadInput, match="not a whole safetensors file"): load_affinity(tmp_path / "torn")
    with pytest.raises(MissingFile, match="no file"): load_affinity(tmp_path / "none")


def test_mask_overlap_and_gate_similarity():
    m = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1.0]])
    assert torch.allclose(mask_overlap(m), torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 1 / 3], [0, 1 / 3, 1]]))
    g = torch.rand(5, 3, 8).softmax(-1)
    want = torch.stack([torch.nn.functional.cosine_similarity(g[:, None, b], g[None, :, b], dim=-1)
                        for b in range(3)]).mean(0)
    assert torch.allclose(gate_similarity(g), want, atol=1e-5)
