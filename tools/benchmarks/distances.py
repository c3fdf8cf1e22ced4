"""What a Fréchet distance and its bootstrap cost.

`python tools/benchmarks/distances.py [--rounds 5] [--widths 64 768 2048]`: the bootstrap against one that takes each
resample's distance from its moments with two eigendecompositions, and a distance against scipy's matrix root; processor
seconds of one process, in turn, the median of the rounds' ratios with their quartiles, and how far the two answers are
apart.
"""
import argparse
import statistics
import time
import warnings

import numpy as np
import scipy.linalg
import torch

from dmp_wb.core.seeds import seed_of
from dmp_wb.evaluation.distances import frechet_bootstrap, frechet_distance, Moments

LIMIT = 0.7                                         # of the time of the bootstrap round by round
SETS = {64: (1000, 20), 768: (2000, 3), 2048: (2500, 1)}   # width → images, rounds of the bootstrap


def by_eigenvectors(a: Moments, b: Moments) -> float:
    "The distance with the symmetric root of the first covariance."
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def round_by_round(features: torch.Tensor, real: Moments, rounds: int) -> list[float]:
    "The interval of `frechet_bootstrap`, of the same resamples."
    g = torch.Generator().manual_seed(seed_of(0, "bootstrap"))
    point = by_eigenvectors(Moments().update(features), real)
    rows = [torch.randint(len(features), (len(features),), generator=g) for _ in range(rounds)]
    found = torch.tensor([by_eigenvectors(Moments().update(features[r]), real) for r in rows], dtype=torch.float64)
    return (found - found.mean() + point).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def by_scipy(a: Moments, b: Moments) -> float:
    "As the evaluators of the papers compute it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    traces = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root.real)
    return float((a.mean - b.mean).square().sum() + traces)


def spent(f, *args):
    "Processor seconds, and the answer."
    start = time.process_time()
    answer = f(*args)
    return time.process_time() - start, answer


def in_turn(title: str, ours, theirs, rounds: int) -> float:
    "The median ratio of two functions' times."
    ratios, apart = [], 0.0
    for i in range(rounds):
        found = {f: spent(f) for f in ((ours, theirs) if i % 2 else (theirs, ours))}   # neither is always first
        (mine, a), (other, b) = found[ours], found[theirs]
        ratios.append(mine / other)
        apart = max(apart, *(abs(x / y - 1) for x, y in zip(np.atleast_1d(a), np.atleast_1d(b))))
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(f"{title:44} {middle:.2f} of the time ({low:.2f} to {high:.2f}), answers {apart:.0e} apart", flush=True)
    return statistics.median(ratios)


def measure(width: int, rounds: int) -> float:
    "The bootstrap's ratio; prints it and those of one distance."
    images, resamples = SETS[width]
    g = torch.Generator().manual_seed(0)
    # features of networks are correlated: the eigenvalues of their covariance fall by three orders
    mix = torch.linalg.qr(torch.randn(width, width, generator=g))[0] * torch.logspace(0, -1.5, width)
    draw = lambda n: torch.randn(n, width, generator=g) @ mix
    real, features = Moments().update(draw(2 * width + 1000)), draw(images) * 1.1 + 0.05
    own = Moments().update(features)
    bootstrap = lambda: frechet_bootstrap({"m": features}, real, rounds=resamples)["m"]["interval"]
    distance = lambda: frechet_distance(own, real)
    found = in_turn(f"bootstrap, {images} × {width}, {resamples} rounds", bootstrap,
                    lambda: round_by_round(features, real, resamples), rounds)
    in_turn(f"a distance of {width}, by scipy", distance, lambda: by_scipy(own, real), rounds)
    in_turn(f"a distance of {width}, by eigenvectors", distance, lambda: by_eigenvectors(own, real), rounds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[*SETS])
    args = parser.parse_args()
    found = {width: measure(width, args.rounds) for width in args.widths}
    if slow := {width: round(ratio, 2) for width, ratio in found.items() if ratio > LIMIT}:
        raise SystemExit(f"error: the bootstrap takes more than {LIMIT} of the time of one round by round: {slow}")


if __name__ == "__main__": main()
