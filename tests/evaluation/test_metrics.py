import json
import warnings
import zipfile

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.seeds import seed_of
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.load import load_data
from dmp_wb.evaluation import distances
from dmp_wb.evaluation.distances import (
    bootstrap_mean, density_coverage, frechet_bootstrap, frechet_distance, inception_score, kernel_distance,
    Moments, precision_recall, ScoreSums,
)
from dmp_wb.evaluation.evaluate import evaluate, evaluate_run, guidance_sweep, note_evaluation
from dmp_wb.evaluation.extractors import classifier_accuracy, evaluate_digits, extract, load_extractor
from dmp_wb.evaluation.features import digit_classifier, ModuleFeatures, split_digits
from dmp_wb.evaluation.images import data_images, Images, open_samples
from dmp_wb.evaluation.statistics import collect, reference_statistics


def by_definition(p, q):
    root = scipy.linalg.sqrtm(np.cov(p.T) @ np.cov(q.T))
    return (((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(np.cov(p.T)) + np.trace(np.cov(q.T))
            - 2 * np.trace(np.real(root)))


@given(st.integers(0, 10_000), st.integers(2, 24), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_frechet_is_scipys(seed, width, scale):
    rng = np.random.default_rng(seed)
    p, q = (rng.normal(size=(width * 8, width)) @ rng.normal(size=(width, width)) * scale + rng.normal(size=width)
            for _ in range(2))
    assert np.isclose(frechet_distance(torch.tensor(p), torch.tensor(q)), by_definition(p, q), rtol=1e-6)


def test_frechet_properties():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(300, 8, generator=g), torch.randn(200, 8, generator=g) * 2 + 1
    assert frechet_distance(p, p) < 1e-9 and np.isclose(frechet_distance(p, q), frechet_distance(q, p), rtol=1e-9)
    # a shift of 3 in each of 8 directions
    assert np.isclose(frechet_distance(p, p + 3), 9 * 8, rtol=1e-6)
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
    assert torch.allclose(m.mean, x.double().mean(0)) and torch.allclose(m.covariance, x.double().T.cov(), rtol=1e-9,
                                                                         atol=1e-12)


def test_moments_bad_input():
    with pytest.raises(BadInput, match="NaN"): Moments().update(torch.tensor([[float("nan")]]))
    with pytest.raises(BadInput, match="expected \\[samples, width\\]"): Moments().update(torch.zeros(3))
    with pytest.raises(BadInput, match="1 samples have no covariance"):
        Moments().update(torch.zeros(1, 2)).covariance  # noqa: B018


def test_moments_that_are_known():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m, known = Moments().update(x), Moments.of(x.mean(0), x.T.cov(), 50)
    assert torch.allclose(known.mean, m.mean) and torch.allclose(known.covariance, m.covariance) and torch.allclose(
        Moments.of(x.mean(0), x.T.cov()).covariance, m.covariance)
    # and more can be added
    assert torch.allclose(known.update(x + 1).covariance, Moments().update(x).update(x + 1).covariance)
    with pytest.raises(BadInput, match="expected \\[width\\] and \\[width, width\\]"): Moments.of(x.mean(0), x)
    with pytest.raises(BadInput, match="NaN"): Moments.of(x.mean(0) * float("nan"), x.T.cov())
    with pytest.raises(BadInput, match="width 3: expected 4"): m.update(x[:, :3])
    with pytest.raises(BadInput, match="widths 4 and 3"): frechet_distance(x, x[:, :3])


def test_bootstrap_interval_covers_and_pairs():
    g = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(4000, 6, generator=g), torch.randn(600, 6, generator=g)
    figures = frechet_bootstrap({"a": noise + 0.3, "b": noise + 0.35, "c": torch.randn(600, 6, generator=g) + 0.35},
                                reference, against="a", rounds=100)
    for f in figures.values(): assert f["interval"][0] < f["frechet"] < f["interval"][1]
    width = lambda f: f["difference_interval"][1] - f["difference_interval"][0]
    # the same seeds: the difference is clear
    assert figures["b"]["difference"] > 0 and figures["b"]["difference_interval"][0] > 0
    assert width(figures["b"]) < 0.5 * width(figures["c"])                                    # other seeds: it is not
    again = frechet_bootstrap({"a": noise + 0.3}, reference, rounds=100)
    assert again["a"]["interval"] == figures["a"]["interval"]                                 # seeded
    with pytest.raises(BadInput, match="same number"): frechet_bootstrap({"a": noise, "b": noise[1:]}, reference)
    with pytest.raises(BadInput, match="against is 'x'"): frechet_bootstrap({"a": noise}, reference, against="x")


@pytest.mark.parametrize("images, width", [(400, 12), (30, 40)])   # fewer rows than columns as well
@pytest.mark.parametrize("balanced", [False, True])
def test_a_bootstrap_is_the_distances_of_the_resamples(images, width, balanced):
    g = torch.Generator().manual_seed(0)
    reference = Moments().update(torch.randn(500, width, generator=g) @ torch.randn(width, width, generator=g))
    features = {"a": torch.randn(images, width, generator=g) + 5, "b": torch.randn(images, width, generator=g) * 2}
    strata = torch.arange(images) % 5 if balanced else None
    got = frechet_bootstrap(features, reference, strata=strata, rounds=7, seed=3, against="a")
    g = torch.Generator().manual_seed(seed_of(3, "bootstrap"))
    groups = [(strata == c).nonzero()[:, 0] for c in range(5)] if balanced else [torch.arange(images)]
    rows = [torch.cat([group[torch.randint(len(group), (len(group),), generator=g)] for group in groups])
            for _ in range(7)]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    # what rounding leaves of eigenvalues that are zero has a root of 1e-8 of the largest
    near = dict(rel=1e-8 if images > width else 1e-6)
    for name, f in features.items():
        point = frechet_distance(f, reference)
        drawn = torch.tensor([frechet_distance(f[r], reference) for r in rows], dtype=torch.float64)
        assert got[name]["frechet"] == pytest.approx(point, **near)
        assert got[name]["interval"] == pytest.approx((drawn - drawn.mean() + point).quantile(ends).tolist(), **near)


def test_the_reference_is_decomposed_once_however_many_rounds(monkeypatch):
    g, found, calls = torch.Generator().manual_seed(0), distances._root, []
    monkeypatch.setattr(distances, "_root", lambda covariance: calls.append(1) or found(covariance))
    frechet_bootstrap({n: torch.randn(50, 4, generator=g) for n in "abc"}, torch.randn(90, 4, generator=g), rounds=20)
    assert len(calls) == 1


def test_bootstrap_interval_has_its_level():
    "Of many repetitions with a known answer, most intervals hold it."
    g = torch.Generator().manual_seed(1)
    reference = Moments().update(torch.randn(200_000, 3, generator=g))
    shift, hits = 0.5, 0
    for i in range(40):
        f = frechet_bootstrap({"a": torch.randn(500, 3, generator=g) + shift}, reference, rounds=80,
                              seed=i)["a"]["interval"]
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
    real, soft, noise = (evaluate_digits(x, data.labels)
                         for x in (data.images, blurred, torch.rand_like(data.images) * 2 - 1))
    assert (real["frechet"] < 1e-6 < soft["frechet"] < noise["frechet"]
            and real["accuracy"] > 0.99 > soft["accuracy"] > noise["accuracy"])
    with pytest.raises(BadInput, match="expected \\[N, 1, 8, 8\\]"):
        evaluate_digits(torch.zeros(2, 3, 8, 8), data.labels[:2])
    with pytest.raises(BadInput, match="2 images and 3 labels"):
        classifier_accuracy(torch.zeros(2, 1, 8, 8), data.labels[:3])


def test_extract_in_batches():
    images = load_data("digits").images[:70]
    assert torch.allclose(extract(digit_classifier(), images, 16), extract(digit_classifier(), images), atol=1e-5)
    assert extract(digit_classifier(), images).shape == (70, 64)


def test_intervals_of_balanced_samples_have_the_width_of_the_true_spread():
    """Class-balanced draws from real digits:
    the bootstrap must not add the variance of class proportions, which these samples do not have."""
    data = load_data("digits")
    features = extract(digit_classifier(), data.images)
    reference, g = Moments().update(features), torch.Generator().manual_seed(0)
    by_class = [(data.labels == c).nonzero()[:, 0] for c in range(10)]
    labels = torch.arange(10).repeat_interleave(50)
    draw = lambda: features[torch.cat([rows[torch.randint(len(rows), (50,), generator=g)] for rows in by_class])]
    values = torch.tensor([frechet_distance(draw(), reference) for _ in range(60)])
    true_width = (values.quantile(0.975) - values.quantile(0.025)).item()
    width = lambda **kw: (lambda low, high: high - low)(
        *frechet_bootstrap({"a": draw()}, reference, rounds=120, **kw)["a"]["interval"])
    assert true_width / 1.7 < width(strata=labels) < 1.7 * true_width < width()

# ---- references, written from the papers' formulas, one pair of images at a time

def kid_by_definition(x, y):
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3
    n, m = len(x), len(y)
    own = lambda z: sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))
    return own(x) + own(y) - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def score_by_definition(logits, splits):
    p = scipy.special.softmax(logits, axis=1)
    scores = [np.exp(np.mean([scipy.special.rel_entr(row, part.mean(0)).sum() for row in part]))
              for part in np.array_split(p, splits)]
    return np.mean(scores), np.std(scores)


def manifold_by_definition(fake, real, k, k_density):
    "Precision, recall (1904.06991, equation 1), density, coverage (2002.09797, section 3.1)."
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    radius = lambda z, k: np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(distance(z, z))])
    far = distance(real, fake)
    return {"precision": np.mean([(far[:, j] <= radius(real, k)).any() for j in range(len(fake))]),
            "recall": np.mean([(far[i] <= radius(fake, k)).any() for i in range(len(real))]),
            "density": sum((far[:, j] <= radius(real, k_density)).sum() for j in range(len(fake)))
            / (k_density * len(fake)),
            "coverage": np.mean([far[i].min() <= radius(real, k_density)[i] for i in range(len(real))])}


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12), st.integers(1, 9), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_kid_is_the_unbiased_estimate(seed, n, m, width, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, width)) * scale, rng.normal(size=(m, width)) * scale + 1
    if n == m:
        assert (np.isclose(kernel_distance(torch.tensor(x), torch.tensor(y))[0], kid_by_definition(x, y), rtol=1e-9)
                and kernel_distance(torch.tensor(x), torch.tensor(y))[1] == 0)
    size = min(n, m)
    mean, std = kernel_distance(torch.tensor(x), torch.tensor(y), subsets=7, subset_size=size, seed=seed)
    assert np.isfinite([mean, std]).all() and std >= 0


def test_kid_subsets():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g), torch.randn(40, 5, generator=g) + 0.5
    mean, std = kernel_distance(x, y, subsets=400, subset_size=20, seed=1)
    values = [kid_by_definition(x[torch.randperm(60, generator=g)[:20]].double().numpy(),
                                y[torch.randperm(40, generator=g)[:20]].double().numpy()) for _ in range(150)]
    assert abs(mean - np.mean(values)) < 4 * np.std(values) / np.sqrt(150) and 0.7 < std / np.std(values) < 1.4
    assert kernel_distance(x, y, 5, 20, 1) == kernel_distance(x, y, 5, 20, 1) != kernel_distance(x, y, 5, 20, 2)
    with pytest.raises(BadInput, match="subset_size is 41: expected 2 to 40"): kernel_distance(x, y, subset_size=41)
    with pytest.raises(BadInput, match="subset_size is 1:"): kernel_distance(x[:1], y)
    with pytest.raises(BadInput, match="subsets is 0"): kernel_distance(x, y, 0)
    with pytest.raises(BadInput, match="widths 5 and 4"): kernel_distance(x, y[:, :4])
    with pytest.raises(BadInput, match="NaN"): kernel_distance(x * float("nan"), y)
    # unbiased: no floor
    assert abs(kernel_distance(torch.randn(3000, 5, generator=g), torch.randn(3000, 5, generator=g))[0]) < 0.02


@given(st.integers(0, 10_000), st.integers(4, 60), st.integers(2, 8), st.integers(1, 4), st.floats(0, 30))
@settings(max_examples=30, deadline=None)
def test_inception_score_is_the_formula(seed, n, classes, splits, scale):
    logits = np.random.default_rng(seed).normal(size=(n, classes)) * scale
    mean, std = inception_score(torch.tensor(logits), splits, seed=None)
    parts = [logits[i * n // splits:(i + 1) * n // splits] for i in range(splits)]
    want = [score_by_definition(part, 1)[0] for part in parts]
    assert np.isclose(mean, np.mean(want), rtol=1e-9) and np.isclose(std, np.std(want), rtol=1e-6, atol=1e-9)


def test_inception_score_properties():
    sure = torch.eye(10).repeat_interleave(30, 0) * 1000           # sorted by class, and so sure that p underflows
    assert np.isclose(inception_score(sure, 1)[0], 10) and inception_score(sure)[0] > 7      # parts are mixed
    # in order they are one class each
    assert np.isclose(inception_score(sure, seed=None)[0], 1)
    assert np.isclose(inception_score(torch.zeros(50, 10))[0], 1)
    z, s = torch.randn(53, 6, generator=torch.Generator().manual_seed(0)), ScoreSums(53, 4)
    for part in z.split([1, 20, 32]): s.update(part)
    assert np.allclose(s.result(), inception_score(z, 4), rtol=1e-12)                        # streaming is the same
    with pytest.raises(BadInput, match="splits is 10: expected 1 to 9"): inception_score(z[:9])
    with pytest.raises(BadInput, match="NaN"): inception_score(z * float("nan"))
    with pytest.raises(BadInput, match="20 samples: expected 53"): ScoreSums(53, 4).update(z[:20]).result()
    with pytest.raises(BadInput, match="more than 20 samples"): ScoreSums(20, 4).update(z)
    with pytest.raises(BadInput, match="expected \\[samples, classes\\]"): ScoreSums(20, 4).update(z[0])


@given(st.integers(0, 10_000), st.integers(7, 40), st.integers(7, 40), st.integers(1, 6), st.integers(1, 6),
       st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_neighbourhoods_are_the_definitions(seed, n, m, width, k, k_density):
    rng = np.random.default_rng(seed)
    fake, real = (rng.normal(size=(n, width)) + 0.5).astype(np.float32), rng.normal(size=(m, width)).astype(np.float32)
    got = precision_recall(torch.tensor(fake), torch.tensor(real), k) | density_coverage(torch.tensor(fake),
                                                                                         torch.tensor(real), k_density)
    want = manifold_by_definition(fake.astype(float), real.astype(float), k, k_density)
    for name in want: assert np.isclose(got[name], want[name], atol=1e-9), name


def test_neighbourhoods_in_blocks_and_far_from_zero(monkeypatch):
    g = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(150, 4, generator=g, dtype=torch.float64) + 0.5,
                  torch.randn(170, 4, generator=g, dtype=torch.float64))
    whole = precision_recall(fake, real) | density_coverage(fake, real)
    monkeypatch.setattr("dmp_wb.evaluation.distances._BLOCK", 1000)
    assert precision_recall(fake, real) | density_coverage(fake, real) == whole
    shifted = precision_recall(fake + 1e5, real + 1e5) | density_coverage(fake + 1e5, real + 1e5)
    assert shifted == pytest.approx(whole)                                          # large numbers lose no digits


def test_neighbourhoods_of_equal_and_of_distant_sets():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(100, 8, generator=g)
    # every image four times: radii are zero
    twins = real[:25].repeat(4, 1) * 1000
    for x in (real, twins):
        same = precision_recall(x, x) | density_coverage(x, x)
        assert same["precision"] == same["recall"] == same["coverage"] == 1 and 0.9 < same["density"]
    assert (precision_recall(real, real + 1000) == {"precision": 0, "recall": 0}
            and density_coverage(real, real + 1000) == {"density": 0, "coverage": 0})
    assert density_coverage(real[:1].expand(100, -1), real)["coverage"] < 0.3       # one image a hundred times
    for f in (precision_recall, density_coverage):
        with pytest.raises(BadInput, match="k is 100, with 100 samples and 100 real images"): f(real, real, 100)
        with pytest.raises(BadInput, match="k is 0"): f(real, real, 0)


@pytest.mark.parametrize("name", ["kid", "is", "precision", "density"])
def test_cheap_intervals_have_the_width_of_the_true_spread(name):
    "Against drawing new samples, forty times."
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(600, 4, generator=g)
    draw = lambda: torch.randn(300, 4, generator=g) * 0.9 + 0.6
    network = ModuleFeatures(Flat(), ("features", "logits"))

    def measured(x, **kw):
        images = x.view(-1, 1, 2, 2).clamp(-8, 8) / 8
        return evaluate(images, (reference.view(-1, 1, 2, 2).clamp(-8, 8) / 8), network, [name], k=3, splits=1,
                        kid_subset_size=300, kid_subsets=1, batch_size=300, quiet=True, **kw)
    values = torch.tensor([measured(draw())[name] for _ in range(40)])
    true = 4 * values.std().item()                                                  # the width of 95 %
    widths = [(lambda i: i[1] - i[0])(measured(draw(), bootstrap=200)["intervals"][name]) for _ in range(3)]
    assert true / 1.9 < np.median(widths) < 1.9 * true, (true, widths)


class Flat(torch.nn.Module):
    "Pixels as features and as logits."
    def forward(self, x): return {"features": x.flatten(1) * 8, "logits": x.flatten(1) * 16}


class Spatial(torch.nn.Module):
    def forward(self, x): return {"features": x.mean((2, 3)), "spatial": x.flatten(1)}


class Broken(torch.nn.Module):
    def __init__(self, how): super().__init__(); self.how = how
    def forward(self, x): return {"nan": x.flatten(1) * float("nan"), "4d": x, "one": x.flatten()[None]}[self.how]


@pytest.fixture
def digits(): return load_data("digits").images


def assert_same(a, b, rel):
    plain = lambda row: {k: -1 if v is None else v
                         for k, v in row.items() if k != "extractor" and not isinstance(v, str)}
    assert plain(a) == pytest.approx(plain(b), rel=rel, abs=1e-6) and a["extractor"] == b["extractor"]


def as_npz(file, images, **more):
    np.savez_compressed(file, arr_0=((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), **more)
    return file


def as_folder(folder, images):
    folder.mkdir(parents=True)
    for i, x in enumerate(images):
        Image.fromarray(((x[0] + 1) * 127.5).round().byte().numpy()).save(folder / f"{i:05d}.png")
    return folder


def test_evaluate_is_the_sum_of_its_parts(digits):
    half, real, net = digits[:600], extract("digits", digits), digit_classifier()
    got = evaluate(half, "digits", quiet=True, kid_subsets=3, kid_subset_size=200)
    rows = extract("digits", half)
    assert list(got) == ["fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "density", "coverage",
                         "num_images", "num_reference", "extractor"]
    assert (got["fid"] == pytest.approx(frechet_distance(rows, real), rel=1e-6)
            and (got["is"], got["is_std"]) == pytest.approx(inception_score(net(half)), rel=1e-6))
    assert (got["kid"], got["kid_std"]) == pytest.approx(kernel_distance(rows, real, 3, 200), abs=1e-6)
    assert ({k: got[k] for k in ("precision", "recall")} == pytest.approx(precision_recall(rows, real))
            and {k: got[k] for k in ("density", "coverage")} == pytest.approx(density_coverage(rows, real)))
    assert (got["num_images"], got["num_reference"], got["extractor"]) == (600, 1797, "digits")
    assert json.loads(json.dumps(got)) == got
    few = evaluate(half, "digits", metrics="precision fid", quiet=True, batch_size=37)
    assert (list(few) == ["precision", "fid", "num_images", "num_reference", "extractor"]
            and few["fid"] == pytest.approx(got["fid"], rel=1e-4))


def test_samples_may_be_a_tensor_bytes_a_folder_or_an_npz(digits, tmp_path):
    half = ((digits[:300] + 1) * 127.5).round().byte()
    rows = [evaluate(s, "digits", metrics="fid,is,recall", quiet=True)
            for s in (half, half.float() / 127.5 - 1, as_folder(tmp_path / "png", digits[:300]),
                      as_npz(tmp_path / "s.npz", digits[:300]))]
    for row in rows[1:]: assert_same(row, rows[0], 1e-5)
    nested = (as_folder(tmp_path / "classes" / "a", digits[:150])
              and as_folder(tmp_path / "classes" / "b", digits[150:300]).parent)
    assert evaluate(nested, "digits", metrics="fid", quiet=True)["fid"] == pytest.approx(rows[0]["fid"], rel=1e-5)


def test_npz_is_read_a_batch_at_a_time(tmp_path, monkeypatch):
    images = torch.randint(256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    opened = open_samples(tmp_path / "s.npz")
    sizes = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: sizes.append(n) or read(self, n))
    assert torch.equal(torch.cat(list(opened.batches(16))), images) and max(sizes) == 16 * 48


def test_more_images_than_announced(digits):
    opened = Images("x", 100, (1, 8, 8), digits[:101].split)
    with pytest.raises(BadInput, match="x are more than 100"): evaluate(opened, "digits", metrics="fid", quiet=True)
    short = Images("x", 100, (1, 8, 8), digits[:99].split)
    with pytest.raises(BadInput, match="99 samples: expected 100"): evaluate(short, "digits", metrics="is", quiet=True)


def test_wrong_numbers_are_told_before_any_features(digits, monkeypatch):
    reference = reference_statistics("digits", quiet=True)
    monkeypatch.setattr("dmp_wb.evaluation.statistics.collect", lambda *a, **kw: pytest.fail("collected"))
    for bad in (dict(k=40), dict(k_density=0), dict(splits=41), dict(kid_subset_size=41), dict(kid_subsets=0),
                dict(metrics="nothing")):
        with pytest.raises(BadInput): evaluate(digits[:40], reference, **bad)


def test_memory_of_streaming_does_not_grow(digits):
    "What is kept of 40 times as many images has the same size."
    kept = lambda n: sum(t.numel()
                         for m in (collect(Images("x", n, (1, 8, 8), lambda b: (digits[:b] for _ in range(n // b))),
                                           load_extractor("digits", "cpu"), {"moments", "score"}, quiet=True),)
                         for t in (m.moments.outer, m.moments.total, m.moments.shift, m.score.p, m.score.plogp))
    assert kept(64) == kept(2560)


def test_reference_may_be_anything_real(digits, tmp_path):
    half, images = digits[:300], tmp_path / "real"
    want = evaluate(half, "digits", metrics="fid kid coverage", quiet=True)
    m = Moments().update(extract("digits", digits))
    as_folder(images, digits)
    for reference in (digits, DataConfig(), reference_statistics("digits", quiet=True)):
        assert_same(evaluate(half, reference, metrics="fid kid coverage", quiet=True), want, 1e-4)
    for reference in (images, as_npz(tmp_path / "r.npz", digits)):   # 8 bits of 17 grey levels
        assert evaluate(half, reference, metrics="fid kid coverage", quiet=True)["fid"] == pytest.approx(want["fid"],
                                                                                                         rel=2e-2)
    np.savez(tmp_path / "stats.npz", mu=m.mean.numpy(), sigma=m.covariance.numpy())
    scores = evaluate(half, None, quiet=True)
    assert set(scores) == {"is", "is_std", "num_images", "num_reference", "extractor"}
    assert_same(evaluate(half, tmp_path / "stats.npz", quiet=True), {**scores, "fid": want["fid"]}, 1e-4)
    both = as_npz(tmp_path / "both.npz", digits[:500], mu=m.mean.numpy() + 1, sigma=m.covariance.numpy())
    # as ADM: published moments for FID, images for the rest
    got = evaluate(half, both, metrics="fid recall", quiet=True)
    assert got["fid"] == pytest.approx(frechet_distance(extract("digits", half), Moments.of(m.mean + 1, m.covariance)),
                                       rel=1e-4) and got["num_reference"] == 500


def test_spatial_features_give_sfid():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(90, 3, 3, 3, generator=g) * 2 - 1 for _ in range(2))
    e = ModuleFeatures(Spatial(), ("features", "spatial"))
    got = evaluate(x, y, e, quiet=True)
    assert list(got)[:2] == ["fid", "sfid"] and "is" not in got
    assert (got["sfid"] == pytest.approx(frechet_distance(x.flatten(1), y.flatten(1)), rel=1e-6)
            and got["fid"] == pytest.approx(frechet_distance(x.mean((2, 3)), y.mean((2, 3))), rel=1e-6))
    shuffled = y.flatten(2)[:, :, torch.randperm(9, generator=g)].view_as(y) * torch.linspace(0.2, 1, 9).view(3, 3)
    assert evaluate(shuffled, y, e, metrics="sfid", quiet=True)["sfid"] > 1.5 * got["sfid"]


def test_intervals(digits):
    got = evaluate(digits[:400], "digits", bootstrap=60, quiet=True, strata=load_data("digits").labels[:400])
    assert set(got["intervals"]) == {"fid", "kid", "is", "precision", "recall", "density", "coverage"}
    for name, (low, high) in got["intervals"].items():
        assert low <= high and low <= got[name] + 1e-9 and got[name] <= high + (1e-3 if name == "kid" else 1e-9), name
    again = evaluate(digits[:400], "digits", bootstrap=60, quiet=True, strata=load_data("digits").labels[:400])
    assert again == got
    with pytest.raises(BadInput, match="3 strata for 400 samples"):
        evaluate(digits[:400], "digits", bootstrap=60, strata=torch.zeros(3))
    with pytest.raises(BadInput, match="bootstrap is -1"): evaluate(digits[:400], "digits", bootstrap=-1)


@pytest.mark.filterwarnings("ignore:reference images hold no value")
def test_balanced_samples_are_resampled_by_class():
    g = torch.Generator().manual_seed(0)
    real = torch.rand(100, 1, 2, 2, generator=g) * 0.1
    # one class on the manifold, the other far from it
    samples, strata = torch.cat([real[:50], real[:50] - 0.9]), torch.arange(100) // 50
    width = lambda **kw: (lambda i: i[1] - i[0])(
        evaluate(samples, real, Flat(), "precision", bootstrap=200, quiet=True, **kw)["intervals"]["precision"])
    assert width(strata=strata) == pytest.approx(0, abs=1e-12) and width() > 0.1


def test_bootstrap_mean():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=g)
    low, high = bootstrap_mean(x, 2000)
    assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 * x.std().item() / 500**0.5, rel=0.1)
    classes = torch.arange(500) % 5
    low, high = bootstrap_mean(classes.double(), 200, strata=classes)
    assert low == pytest.approx(2) and high == pytest.approx(2)                     # nothing varies within a class


@pytest.mark.parametrize("samples,message", [
    (torch.zeros(20, 3, 8, 8), "images are 3 × 8 × 8: expected 1 × 8 × 8"),
    (torch.zeros(20, 8, 8), "samples have shape \\(20, 8, 8\\): expected \\[N, C, H, W\\]"),
    (torch.zeros(()), "samples have shape \\(\\)"),
    (torch.zeros(0, 1, 8, 8), "samples are empty"),
    (torch.zeros(20, 1, 8, 8, dtype=torch.int64), "samples are int64: expected uint8, or floats"),
    (torch.full((20, 1, 8, 8), 255.0), "samples reach from 255 to 255: expected floats in"),
    (torch.full((20, 1, 8, 8), float("nan")), "samples hold NaN"),
    (torch.full((20, 1, 8, 8), float("inf")), "samples hold NaN or infinite"),
    (3, "samples are a int: expected a tensor"),
    ("no/such/place", "samples are 'no/such/place': there is no such folder"),
])
def test_bad_samples(samples, message):
    with pytest.raises(BadInput, match=message) as e: evaluate(samples, "digits", "digits", quiet=True)
    assert "\n" not in str(e.value)


def test_a_late_bad_value_is_found(digits):
    bad = digits[:200].clone()
    bad[190, 0, 3, 3] = 1.5
    with pytest.raises(BadInput, match="samples reach from -1 to 1.5"): evaluate(bad, "digits", quiet=True)


def test_bad_folders_and_files_of_samples(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no images"): evaluate(tmp_path / "empty", "digits")
    folder = as_folder(tmp_path / "png", digits[:20])
    Image.new("L", (9, 8)).save(folder / "00012.png")
    with pytest.raises(BadInput, match="00012.png is 8 × 9: expected 8 × 8, as 00000.png"):
        evaluate(folder, "digits", quiet=True)
    (folder / "00012.png").write_bytes((folder / "00011.png").read_bytes()[:40])
    with pytest.raises(BadInput, match="sample .*00012.png is"): evaluate(folder, "digits", quiet=True)
    (folder / "00000.png").write_bytes(b"")
    with pytest.raises(BadInput, match="00000.png is empty"): evaluate(folder, "digits", quiet=True)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(BadInput, match="expected a folder of images or an .npz"): evaluate(tmp_path / "x.txt", "digits")
    (tmp_path / "x.npz").write_text("x")
    with pytest.raises(BadInput, match="is damaged or no .npz"): evaluate(tmp_path / "x.npz", "digits")
    with pytest.raises(BadInput, match="no file .*y.npz"): evaluate(tmp_path / "y.npz", "digits")
    for name, arrays, message in (
            ("names", {"images": np.zeros(3)}, "holds images: expected arr_0"),
            ("float", {"arr_0": np.zeros((3, 8, 8, 1))}, "is float64 \\[3, 8, 8, 1\\]: expected uint8"),
            ("nchw", {"arr_0": np.zeros((3, 1, 8, 8), np.uint8)}, "is uint8 \\[3, 1, 8, 8\\]"),
            ("none", {"arr_0": np.zeros((0, 8, 8, 1), np.uint8)}, "expected uint8 images"),
            ("object", {"arr_0": np.array([None, {}], dtype=object)}, "is object"),
            ("fortran", {"arr_0": np.asfortranarray(np.zeros((3, 8, 8, 1), np.uint8))}, "Fortran")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(BadInput, match=message) as e: evaluate(tmp_path / f"{name}.npz", "digits")
        assert "\n" not in str(e.value)
    cut = as_npz(tmp_path / "cut.npz", digits[:500])
    whole = bytearray(cut.read_bytes())
    whole[len(whole) // 2:len(whole) // 2 + 50] = bytes(50)
    cut.write_bytes(whole)
    with pytest.raises(BadInput, match="arr_0 of .*cut.npz is damaged") as e: evaluate(cut, "digits", quiet=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings,message", [
    (dict(metrics="fdi"), "unknown metric 'fdi': did you mean 'fid'"),
    (dict(metrics="sfid"),
     "metric sfid needs spatial features, which extractor digits does not give: expected some of fid, kid, is"),
    (dict(metrics=[]), "no metrics are named"),
    (dict(k=30), "k is 30, with 30 samples and 1797 real images"),
    (dict(k=0), "k is 0"),
    (dict(k_density=30), "k_density is 30"),
    (dict(splits=31), "splits is 31: expected 1 to 30"),
    (dict(kid_subset_size=31), "subset_size is 31: expected 2 to 30"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(extractor="incep"), "unknown extractor"),
    (dict(reference=None, metrics="fid"), "metric fid needs a reference"),
    (dict(reference="digts"), "unknown data set 'digts': did you mean 'digits'"),
    (dict(reference=3), "reference is a int"),
    (dict(reference=torch.zeros(30, 1, 9, 9)), "images are 1 × 9 × 9"),
    (dict(reference=torch.zeros(30, 3, 9, 9), extractor=Flat()), "samples are 1 × 8 × 8 and the real images 3 × 9 × 9"),
    (dict(extractor=Broken("nan")), "extractor Broken gave NaN or infinite features"),
    (dict(extractor=Broken("4d")), "extractor Broken gave features of shape \\[64, 1, 8, 8\\]"),
    (dict(extractor=Broken("one")), "extractor Broken gave features of shape \\[1, "),
    (dict(level=1.0, bootstrap=5), "level 1.0"),
])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_settings(digits, settings, message):
    with pytest.raises(BadInput, match=message) as e:
        evaluate(digits[:30], **{"reference": "digits", "quiet": True, **settings})
    assert "\n" not in str(e.value)


def test_a_reference_of_moments_alone_cannot_give_the_rest(digits, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(BadInput, match="metric kid needs real images, and the reference holds only their mean and "
                       "covariance: expected some of fid, is"):
        evaluate(digits[:100], tmp_path / "s.npz", metrics="kid")
    for name, arrays, message in (
            ("wide", {"mu": np.zeros(2048), "sigma": np.eye(2048)}, "mu of .* has 2048 values: expected 64"),
            ("bent", {"mu": np.zeros(64), "sigma": np.eye(63)}, "shapes \\(64,\\) and \\(63, 63\\)"),
            ("nan", {"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "NaN"),
            ("text", {"mu": np.array("x"), "sigma": np.eye(64)}, "cannot be read"),
            ("half", {"mu": np.zeros(64)}, "holds mu: expected mu and sigma, or arr_0"),
            ("object", {"mu": np.array([None]), "sigma": np.eye(64)}, "cannot be read")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(BadInput, match=message): evaluate(digits[:100], tmp_path / f"{name}.npz", quiet=True)


def test_warnings_about_few_images_and_wrong_range(digits):
    with pytest.warns(UserWarning, match="fid from 50 samples and 64 features: .* expected at least 65"):
        evaluate(digits[:50], "digits", metrics="fid", quiet=True)
    with pytest.warns(UserWarning, match="fid from 60 real images and 64 features"):
        evaluate(digits[:100], digits[:60], metrics="fid", quiet=True)
    with pytest.warns(UserWarning, match="no value below 0: expected .*are they in \\[0, 1\\]"):
        evaluate((digits[:100] + 1) / 2, "digits", metrics="is", quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(digits[:100], "digits", metrics="fid is", quiet=True)


# ---- the cache of real statistics

def caches(runs_folder):
    return sorted((runs_folder / ".statistics").iterdir()) if (runs_folder / ".statistics").exists() else []


def test_statistics_are_cached_and_verified(digits, runs_folder, monkeypatch):
    first = reference_statistics("digits", quiet=True)
    (folder,) = caches(runs_folder)
    assert {p.name for p in folder.iterdir()} == {"statistics.json", "statistics.safetensors"}
    calls = []
    monkeypatch.setattr("dmp_wb.evaluation.statistics.collect",
                        lambda *a, _real=collect, **kw: calls.append(1) or _real(*a, **kw))
    second = reference_statistics("digits", quiet=True)
    assert (not calls and torch.equal(first.rows, second.rows) and second.num_images == 1797
            and second.shape == (1, 8, 8))
    assert (torch.allclose(first.moments.mean, second.moments.mean, rtol=1e-12)
            and torch.allclose(first.moments.covariance, second.moments.covariance, rtol=1e-12)
            and frechet_distance(first.moments, second.moments) < 1e-9)
    def flip():   # one number is another; the file can still be read
        whole = bytearray((folder / "statistics.safetensors").read_bytes())
        whole[-5] ^= 1
        (folder / "statistics.safetensors").write_bytes(whole)
    for damage in (flip, lambda: (folder / "statistics.safetensors").write_bytes(
        (folder / "statistics.safetensors").read_bytes()[:-9]), lambda: (folder / "statistics.json").write_text("{"),
                   lambda: (folder / "statistics.json").write_text("[]"),
                   lambda: (folder / "statistics.safetensors").unlink(), lambda: (folder / "statistics.json").unlink()):
        damage()
        calls.clear()
        with pytest.warns(UserWarning, match="cached statistics .* are damaged and are computed again"):
            third = reference_statistics("digits", quiet=True)
        assert calls == [1] and torch.equal(third.rows, first.rows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reference_statistics("digits", quiet=True)                              # whole again
        assert calls == [1]


def test_statistics_are_told_apart(digits, tmp_path, runs_folder, monkeypatch):
    a, b = as_folder(tmp_path / "a", digits[:80]), as_folder(tmp_path / "b", -digits[:80])   # the same names
    e = load_extractor("digits", "cpu")
    one, two = (reference_statistics(DataConfig(name=str(f), size=8, channels=1), e, quiet=True) for f in (a, b))
    assert len(caches(runs_folder)) == 2 and not torch.equal(one.rows, two.rows)
    # another image under the same name
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(a / "00003.png")
    changed = reference_statistics(DataConfig(name=str(a), size=8, channels=1), e, quiet=True)
    assert len(caches(runs_folder)) == 3 and not torch.equal(changed.rows, one.rows)
    many, reference = as_folder(tmp_path / "many", digits[:130]), DataConfig(name=str(tmp_path / "many"), size=8,
                                                                             channels=1)
    before = data_images(reference).fingerprint()
    # not one of those whose content is looked at
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(many / "00003.png")
    assert data_images(reference).fingerprint() != before
    other = load_extractor("digits", "cpu")
    with torch.no_grad(): other.network.body[0].weight.mul_(2)
    other.weights = "another"
    (reference_statistics("digits", other, quiet=True), reference_statistics("digits", e, quiet=True),
     reference_statistics("digits", e, max_rows=100, quiet=True))
    assert len(caches(runs_folder)) == 6
    (reference_statistics(digits, e, quiet=True), reference_statistics("digits", Flat(), quiet=True),
     reference_statistics("digits", e, cache=False, max_rows=50, quiet=True))
    # tensors and own networks are not kept
    assert len(caches(runs_folder)) == 6
    file = as_npz(tmp_path / "r.npz", digits[:90])
    reference_statistics(file, e, quiet=True)
    as_npz(file, digits[90:180])
    assert frechet_distance(reference_statistics(file, e, quiet=True).rows, extract(
        "digits", ((digits[90:180] + 1) * 127.5).round() / 127.5 - 1)) < 1e-3 and len(caches(runs_folder)) == 8


def test_rows_are_a_random_part_and_moments_of_all(digits):
    s, real = (reference_statistics("digits", max_rows=200, cache=False, quiet=True, batch_size=100),
               extract("digits", digits))
    which = torch.cdist(s.rows, real).argmin(1)
    assert len(s.rows) == 200 and which.max() > 1500 and which.min() < 300 and frechet_distance(s.moments, real) < 1e-6


def test_unwritable_cache_is_no_obstacle(runs_folder):
    runs_folder.mkdir()
    (runs_folder / ".statistics").write_text("a file in the way")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert reference_statistics("digits", quiet=True).num_images == 1797


def test_bad_images_of_a_data_set_are_skipped(digits, tmp_path, capsys):
    folder = as_folder(tmp_path / "a", digits[:80])
    (folder / "00007.png").write_bytes(b"broken")
    s = reference_statistics(DataConfig(name=str(folder), size=8, channels=1), quiet=True)
    assert s.num_images == 79 == len(s.rows) and "00007.png" in capsys.readouterr().out
    with pytest.raises(BadInput, match="cannot be read, more than data.max_bad_images"):
        reference_statistics(DataConfig(name=str(folder), size=8, channels=1, max_bad_images=0), cache=False,
                             quiet=True)


def test_a_latent_caches_reference_is_the_images_it_was_made_of(tmp_path):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  block_out_channels=[8, 8], norm_num_groups=4, sample_size=16).save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i}.png")
    config = DataConfig(name=str(tmp_path / "photos"), size=16, vae=str(tmp_path / "vae"), num_workers=0)
    write_cache(config, tmp_path / "latents")
    want = reference_statistics(DataConfig(name=str(tmp_path / "photos"), size=16), Flat(), quiet=True)
    for reference in (config, DataConfig(name=str(tmp_path / "latents"))):
        found = reference_statistics(reference, Flat(), quiet=True)
        assert found.shape == (3, 16, 16) and torch.equal(found.rows, want.rows)


# ---- runs

@pytest.fixture
def run(runs_folder):
    "A finished run of a few steps."
    return wb.train("digits-quick", ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2",
                                     "train.steps=3", "train.batch_size=16"], folder=runs_folder / "tiny")


QUICK = dict(num_inference_steps=2, quiet=True, metrics="fid precision")


@pytest.mark.filterwarnings("ignore:fid from")
def test_evaluate_run_notes_a_row(run):
    row = evaluate_run(run.folder, 40, **QUICK)
    summary = wb.open_run(run.folder).summary
    assert summary["evaluations"] == [row] and summary["status"] == "finished" and wb.open_run(run.folder).finished
    assert (row["guidance_scale"] == 1.5 and row["sampler"] == "dpmsolver++" and row["reference"] == "digits"
            and row["num_images"] == 40)
    images = wb.sample(wb.load_model(run.folder), 40, num_inference_steps=2, schedule=run.experiment.schedule,
                       quiet=True)
    assert row["fid"] == pytest.approx(evaluate(images, "digits", metrics="fid", quiet=True)["fid"], rel=1e-4)
    # the same settings: one row, with both
    more = evaluate_run("tiny", 40, **{**QUICK, "metrics": "recall"})
    assert wb.open_run(run.folder).summary["evaluations"] == [{**row, **more}]
    evaluate_run("tiny", 40, guidance_scale=2.0, **QUICK), evaluate_run("tiny", 40, seed=1, **QUICK)
    assert [(r["guidance_scale"], r["seed"])
            for r in wb.open_run(run.folder).summary["evaluations"]] == [(1.5, 0), (2.0, 0), (1.5, 1)]
    # other neighbours, another row
    assert (evaluate_run("tiny", 40, k=7, **QUICK)["settings"] == {"k": 7}
            and len(wb.open_run(run.folder).summary["evaluations"]) == 4)
    evaluate_run("tiny", 40, bootstrap=3, **QUICK)
    evaluate_run("tiny", 40, guidance_scale=3.0, note=False, **QUICK)
    rows = wb.open_run(run.folder).summary["evaluations"]
    assert len(rows) == 4 and rows[-1]["recall"] == more["recall"] and set(rows[-1]["intervals"]) == {"fid",
                                                                                                      "precision"}


@pytest.mark.filterwarnings("ignore:fid from")
def test_batches_of_a_run_change_nothing(run):
    rows = [guidance_sweep(run.folder, [1.5], 40, batch_size=b, note=False, **QUICK)[0] for b in (40, 17)]
    assert_same(rows[0], rows[1], 1e-3)


@pytest.mark.filterwarnings("ignore:fid from")
def test_guidance_sweep_uses_the_same_seeds(run, monkeypatch):
    rows = guidance_sweep(run.folder, (1, 2, 1.0), 30, **QUICK)
    assert [r["guidance_scale"] for r in rows] == [1, 2, 1] and rows[0] == rows[2] and rows[0]["fid"] != rows[1]["fid"]
    model = wb.load_model(run.folder)
    assert guidance_sweep(model, [2], 30, "digits", sampling={"schedule": run.experiment.schedule},
                          **QUICK)[0]["fid"] == pytest.approx(rows[1]["fid"], rel=1e-5)
    for bad, message in ((dict(scales=[]), "scales are empty"), (dict(scales=[1, -2]), "guidance scale -2"),
                         (dict(scales=[float("nan")]), "guidance scale nan"), (dict(num_images=0), "num_images is 0"),
                         (dict(metrics="fdi"), "did you mean 'fid'"), (dict(model="tiyn"), "did you mean 'tiny'"),
                         (dict(extractor="inceptoin"), "did you mean 'inception'"), (dict(sampler="dimm"), "dimm")):
        with pytest.raises(BadInput, match=message):
            guidance_sweep(**{"model": run.folder, "scales": [1], "num_images": 30, **QUICK, **bad})
    with pytest.raises(BadInput, match="reference is None"): guidance_sweep(model, [1], 30)


@pytest.mark.filterwarnings("ignore:fid from")
def test_runs_that_ship_are_not_written_to():
    file = wb.open_run("digits-base").folder / "summary.json"
    before = file.read_bytes()
    assert evaluate_run("digits-base", 20, **QUICK)["fid"] > 0 and file.read_bytes() == before


def test_an_extractor_that_does_not_fit_is_told_before_sampling(run, monkeypatch):
    monkeypatch.setattr("dmp_wb.evaluation.evaluate.sample", lambda *a, **kw: pytest.fail("sampled"))
    with pytest.raises(BadInput, match="metric sfid needs"): evaluate_run(run.folder, 20, metrics="sfid")
    with pytest.raises(BadInput, match="there is no such folder"): evaluate_run(run.folder, 20, "no/such/folder")


def test_a_latent_run_is_decoded(tmp_path, runs_folder):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  block_out_channels=[8, 8], norm_num_groups=4, sample_size=16).save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i}.png")
    wb.train("digits-quick",
             [f"data.name={tmp_path / 'photos'}", "data.size=16", f"data.vae={tmp_path / 'vae'}", "data.num_workers=0",
              "model.hidden_size=16", "model.num_layers=1", "model.in_channels=4", "model.num_classes=null",
              "model.num_attention_heads=2", "train.steps=2", "train.batch_size=8"], folder=runs_folder / "latent")
    row = evaluate_run("latent", 12, extractor=Flat(), num_inference_steps=2, metrics="precision", quiet=True)
    assert (0 <= row["precision"] <= 1
            and (row["num_images"], row["num_reference"], row["extractor"]) == (12, 20, "Flat"))


# ---- folders, notes and files that are not what they should be

def test_a_grey_first_file_does_not_make_the_others_grey(tmp_path):
    rng, colours = np.random.default_rng(0), []
    for i in range(6):
        colours.append(Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)))
        for name in ("colour", "first", "last"):
            (tmp_path / name).mkdir(exist_ok=True)
            (colours[i].convert("L") if i == {"first": 0, "last": 5}.get(name) else colours[i]).save(
                tmp_path / name / f"{i}.png")
    for name in ("colour", "first", "last"):
        images = open_samples(tmp_path / name)
        found = torch.cat([*images.batches(4)])
        assert images.shape == (3, 8, 8) and found.shape == (6, 3, 8, 8) and float(found[2].std(0).max()) > 0
    (tmp_path / "grey").mkdir()
    for i in range(3): colours[i].convert("L").save(tmp_path / "grey" / f"{i}.png")
    assert open_samples(tmp_path / "grey").shape == (1, 8, 8)


def test_rows_noted_by_many_processes_are_all_there(run):
    import multiprocessing
    def note(n):
        for i in range(4): note_evaluation(wb.open_run(run.folder), {"guidance_scale": n, "seed": i, "fid": 1.0})
    processes = [multiprocessing.get_context("fork").Process(target=note, args=(n,)) for n in range(12)]
    for p in processes: p.start()
    for p in processes: p.join()
    rows = run.summary["evaluations"]
    assert (all(p.exitcode == 0 for p in processes) and {(r["guidance_scale"], r["seed"]) for r in rows}
            == {(n, i) for n in range(12) for i in range(4)} and run.finished)


@pytest.mark.filterwarnings("ignore:fid from")
def test_figures_that_cannot_be_noted_are_there_all_the_same(run, monkeypatch, capsys):
    import sys

    from dmp_wb import cli
    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("dmp_wb.store.run.write_json", refuse)
    with pytest.warns(UserWarning,
                      match="the figures are not noted: .*summary.json cannot be written: Permission denied"):
        row = evaluate_run(run.folder, 20, **QUICK)
    assert row["fid"] > 0
    for arguments, lines in ((["evaluate", str(run.folder), "--num-images", "20"], '"fid": '),
                             (["guidance", str(run.folder), "1", "2", "--num-images", "20"], "          2")):
        monkeypatch.setattr(sys, "argv", ["dmp-wb", *arguments, "--num-inference-steps", "2", "--metrics", "fid"])
        with pytest.raises(SystemExit) as e: cli.main()
        out, err = capsys.readouterr()
        assert e.value.code == 2 and lines in out and err.strip().splitlines()[-1].endswith(
            "summary.json cannot be written: Permission denied")


def _forged(path, header, data=b"", encrypted=False, name="arr_0"):
    "An .npz whose header says what it likes."
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data
    with zipfile.ZipFile(path, "w") as z: z.writestr(f"{name}.npy", npy)
    if encrypted:
        raw = bytearray(path.read_bytes())
        raw[6] |= 1
        raw[raw.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(raw)
    return path


def _header(shape, descr="'|u1'", fortran=False):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()


@pytest.mark.parametrize("header, encrypted",
                         [(_header("(1000000000000, 8, 8, 3)"), False), (_header("(1000000000000, 0, 8, 3)"), False),
                          (_header("(-1, 8, 8, 3)"), False), (_header("(2, 8, 8, 1)"), True),
                          (b"(" * 5000, False), (b"-" * 9000 + b"1", False), (_header("(2, 8, 8, 1)", "'|O'"), False),
                          (_header("(" + "9" * 5000 + ", 8, 8, 1)"), False), (_header("('a', 8, 8, 1)"), False),
                          (_header("(True, 8, 8, 1)"), False)], ids=range(10))
def test_forged_images_are_refused_before_anything_is_made_of_them(header, encrypted, tmp_path):
    with pytest.raises(BadInput) as e:
        evaluate(_forged(tmp_path / "x.npz", header, bytes(128), encrypted), None, metrics="is", quiet=True)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(64, complex), np.eye(64), "real numbers"), (np.zeros(64), np.eye(64) * 1j, "real numbers"),
    (np.zeros(64), -np.eye(64), "negative eigenvalues"),
    (np.zeros(64), np.diag([1.0] * 63 + [-1]), "negative eigenvalues"),
    (np.zeros(64), np.eye(64) + np.triu(np.ones((64, 64)), 1), "not symmetric"),
    (np.full(64, np.inf), np.eye(64), "NaN or infinite"), (np.zeros(64), np.full((64, 64), np.nan), "NaN or infinite"),
    (np.zeros(64, bool), np.eye(64), "real numbers"), (np.zeros((64, 1)), np.eye(64), "real numbers")])
def test_statistics_that_no_images_have_are_refused(digits, mu, sigma, message, tmp_path):
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(BadInput, match=message): reference_statistics(tmp_path / "s.npz")
    mean = torch.from_numpy(mu)
    if mean.ndim == 1 and mean.dtype != torch.bool:
        with pytest.raises(BadInput): Moments.of(mean, torch.from_numpy(sigma))


def test_published_statistics_in_float32_are_taken(tmp_path):
    x = torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))   # singular
    np.savez(tmp_path / "s.npz", mu=x.mean(0).float().numpy(), sigma=x.T.cov().float().numpy())
    assert reference_statistics(tmp_path / "s.npz").moments.width == 64
    assert Moments.of(torch.zeros(3), torch.zeros(3, 3)).width == 3


def test_forged_statistics_are_refused(tmp_path):
    for header in (_header("(1000000000000,)", "'<f8'"), _header("(2,)", "'|O'"), b"(" * 5000):
        file = _forged(tmp_path / "x.npz", header, bytes(16), name="mu")
        with zipfile.ZipFile(file, "a") as z: z.writestr("sigma.npy", b"")
        with pytest.raises(BadInput, match="mu and sigma of .*x.npz"): reference_statistics(file)


@pytest.mark.parametrize("wrong", [
    dict(k="3"), dict(k=1.5), dict(splits=None), dict(bootstrap=1.5), dict(bootstrap="9"), dict(level="0.9"),
    dict(seed=None), dict(batch_size="8"), dict(batch_size=0), dict(cache="no"),
    dict(quiet=None), dict(metrics=3), dict(metrics=[3]), dict(strata="ab"), dict(strata=torch.zeros(3)),
    dict(kid_subsets=None), dict(samples=3), dict(samples=None), dict(reference=3), dict(extractor=3)], ids=str)
def test_an_argument_of_another_type_is_one_line(digits, wrong):
    with pytest.raises(BadInput) as e:
        evaluate(**{"samples": digits[:20], "reference": digits[20:60], "quiet": True, **wrong})
    assert "\n" not in str(e.value)
