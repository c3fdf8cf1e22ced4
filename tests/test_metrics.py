import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmp_wb.core import BadInput
from dmp_wb.data import load_data
from dmp_wb.metrics import Moments, classifier_accuracy, digit_classifier, evaluate_digits, extract, frechet_bootstrap, frechet_distance, split_digits


def by_definition(p, q):
    root = scipy.linalg.sqrtm(np.cov(p.T) @ np.cov(q.T))
    return ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(np.cov(p.T)) + np.trace(np.cov(q.T)) - 2 * np.trace(np.real(root))


@given(st.integers(0, 10_000), st.integers(2, 24), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_frechet_is_scipys(seed, width, scale):
    rng = np.random.default_rng(seed)
    p, q = (rng.normal(size=(width * 8, width)) @ rng.normal(size=(width, width)) * scale + rng.normal(size=width) for _ in range(2))
    assert np.isclose(frechet_distance(torch.tensor(p), torch.tensor(q)), by_definition(p, q), rtol=1e-6)


def test_frechet_properties():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(300, 8, generator=g), torch.randn(200, 8, generator=g) * 2 + 1
    assert frechet_distance(p, p) < 1e-9 and np.isclose(frechet_distance(p, q), frechet_distance(q, p), rtol=1e-9)
    assert np.isclose(frechet_distance(p, p + 3), 9 * 8, rtol=1e-6)                      # a shift of 3 in each of 8 directions
    singular = torch.cat([p[:, :4], p[:, :4]], 1)                                        # rank 4 in 8 dimensions
    assert frechet_distance(singular, singular) < 1e-9 and np.isfinite(frechet_distance(singular, q))
    few = p[:3]                                                                          # fewer samples than dimensions
    assert frechet_distance(few, few) < 1e-9


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_moments_do_not_depend_on_the_batches(sizes):
    x = torch.randn(sum(sizes) + 2, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1000   # far from zero
    m = Moments()
    for part in x.split([2, *sizes]): m.update(part)
    assert m.n == len(x)
    assert torch.allclose(m.mean, x.double().mean(0)) and torch.allclose(m.covariance, x.double().T.cov(), rtol=1e-9, atol=1e-12)


def test_moments_bad_input():
    with pytest.raises(BadInput, match="NaN"): Moments().update(torch.tensor([[float("nan")]]))
    with pytest.raises(BadInput, match="expected \\[samples, width\\]"): Moments().update(torch.zeros(3))
    with pytest.raises(BadInput, match="1 samples have no covariance"): Moments().update(torch.zeros(1, 2)).covariance  # noqa: B018


def test_bootstrap_interval_covers_and_pairs():
    g = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(4000, 6, generator=g), torch.randn(600, 6, generator=g)
    figures = frechet_bootstrap({"a": noise + 0.3, "b": noise + 0.35, "c": torch.randn(600, 6, generator=g) + 0.35}, reference, against="a", rounds=100)
    for f in figures.values(): assert f["interval"][0] < f["frechet"] < f["interval"][1]
    width = lambda f: f["difference_interval"][1] - f["difference_interval"][0]
    assert figures["b"]["difference"] > 0 and figures["b"]["difference_interval"][0] > 0      # the same seeds: the difference is clear
    assert width(figures["b"]) < 0.5 * width(figures["c"])                                    # other seeds: it is not
    again = frechet_bootstrap({"a": noise + 0.3}, reference, rounds=100)
    assert again["a"]["interval"] == figures["a"]["interval"]                                 # seeded
    with pytest.raises(BadInput, match="same number"): frechet_bootstrap({"a": noise, "b": noise[1:]}, reference)
    with pytest.raises(BadInput, match="against is 'x'"): frechet_bootstrap({"a": noise}, reference, against="x")


def test_bootstrap_interval_has_its_level():
    "Of many repetitions with a known answer, most intervals hold it."
    g = torch.Generator().manual_seed(1)
    reference = Moments().update(torch.randn(200_000, 3, generator=g))
    shift, hits = 0.5, 0
    for i in range(40):
        f = frechet_bootstrap({"a": torch.randn(500, 3, generator=g) + shift}, reference, rounds=80, seed=i)["a"]["interval"]
        hits += f[0] <= 3 * shift**2 <= f[1]
    assert hits >= 33   # 95 % of 40 is 38; the distance of a finite sample is biased a little


def test_shipped_classifier_on_digits_it_never_saw():
    data, (fit, held_out) = load_data("digits"), split_digits()
    assert len(set(fit.tolist()) & set(held_out.tolist())) == 0 and len(fit) + len(held_out) == 1797
    assert classifier_accuracy(data.images[held_out], data.labels[held_out]) > 0.975
    assert classifier_accuracy(data.images[held_out], (data.labels[held_out] + 1) % 10) < 0.05


def test_evaluate_digits_orders_good_and_bad():
    data = load_data("digits")
    blurred = torch.nn.functional.avg_pool2d(data.images, 3, 1, 1)
    real, soft, noise = (evaluate_digits(x, data.labels) for x in (data.images, blurred, torch.rand_like(data.images) * 2 - 1))
    assert real["frechet"] < 1e-6 < soft["frechet"] < noise["frechet"] and real["accuracy"] > 0.99 > soft["accuracy"] > noise["accuracy"]
    with pytest.raises(BadInput, match="expected \\[N, 1, 8, 8\\]"): evaluate_digits(torch.zeros(2, 3, 8, 8), data.labels[:2])
    with pytest.raises(BadInput, match="2 images and 3 labels"): classifier_accuracy(torch.zeros(2, 1, 8, 8), data.labels[:3])


def test_extract_in_batches():
    images = load_data("digits").images[:70]
    assert torch.allclose(extract(digit_classifier(), images, 16), extract(digit_classifier(), images), atol=1e-5)
    assert extract(digit_classifier(), images).shape == (70, 64)


def test_intervals_of_balanced_samples_have_the_width_of_the_true_spread():
    "Class-balanced draws from real digits: the bootstrap must not add the variance of class proportions, which these samples do not have."
    data = load_data("digits")
    features = extract(digit_classifier(), data.images)
    reference, g = Moments().update(features), torch.Generator().manual_seed(0)
    by_class = [(data.labels == c).nonzero()[:, 0] for c in range(10)]
    labels = torch.arange(10).repeat_interleave(50)
    draw = lambda: features[torch.cat([rows[torch.randint(len(rows), (50,), generator=g)] for rows in by_class])]
    values = torch.tensor([frechet_distance(draw(), reference) for _ in range(60)])
    true_width = (values.quantile(0.975) - values.quantile(0.025)).item()
    width = lambda **kw: (lambda low, high: high - low)(*frechet_bootstrap({"a": draw()}, reference, rounds=120, **kw)["a"]["interval"])
    assert true_width / 1.7 < width(strata=labels) < 1.7 * true_width < width()
