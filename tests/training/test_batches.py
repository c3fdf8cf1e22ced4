"The noise of a batch: a stream a place, equal for any number of processes; and runs of the older noise format."
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from test_training import equal, small, weights

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.seeds import seed_of
from dmp_wb.data.load import load_data
from dmp_wb.data.sources import EpochOrder, Source
from dmp_wb.training import batches
from dmp_wb.training.batches import draw_batch, place_noise, places_of


class Latents(Source):
    "A source that draws latents: its images are the noise that it was given."
    shape, class_names, random_latents = (4, 4, 3), [], True
    def __len__(self): return 100
    def batch(self, indices, flip=None, noise=None, drop=None):
        return {"images": noise, "flip": flip, "indices": indices}


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 16, 16), (3, 7, 5), (1, 1, 1), (3, 200, 200)])
def test_the_noise_of_a_place_depends_on_the_place_alone(shape):
    few = min(24, 2 ** 18 // math.prod(shape))
    whole = place_noise(3, "noise", 5, torch.arange(few), shape)
    assert whole.shape == (few, *shape) and whole.isfinite().all() and whole.is_contiguous()
    g = torch.Generator().manual_seed(0)
    every = torch.arange(few)
    for places in (every[1:], every[-1:], every[::2], torch.randperm(few, generator=g)):
        assert torch.equal(place_noise(3, "noise", 5, places, shape), whole[places])
    first = torch.arange(1)
    others = [place_noise(*of, first, shape) for of in ((4, "noise", 5), (3, "latents", 5), (3, "noise", 6))]
    assert not any(torch.equal(other, whole[:1]) for other in others)


@pytest.mark.parametrize("parts,world_size", [(1, 1), (1, 8), (2, 4), (4, 2)])
def test_processes_and_parts_draw_what_one_draws(parts, world_size):
    exp, data = small(extra=["train.batch_size=32", "data.flip=true"]), Latents()
    order = EpochOrder(len(data), 32, exp.seed)
    draw = lambda **settings: draw_batch(exp, data, order, 4, None, **settings)
    whole, seen = draw(), []
    for rank in range(world_size):
        places = places_of(32, parts, rank, world_size)
        mine = draw(places=places)
        assert all(torch.equal(mine[k], whole[k][places]) for k in whole)
        seen += places.tolist()
    assert sorted(seen) == list(range(32))
    assert not torch.equal(whole["images"], whole["noise"])   # two streams


def test_a_process_draws_no_more_than_its_places(monkeypatch):
    drawn, normal = [], batches._normal
    monkeypatch.setattr(batches, "_normal", lambda philox, out: (drawn.append(out.size), normal(philox, out)))
    exp, data = small(extra=["train.batch_size=64"]), Latents()
    draw_batch(exp, data, EpochOrder(len(data), 64, 0), 0, None, places=places_of(64, 2, 3, 8))
    assert sum(drawn) == 2 * 8 * 64   # noise and latents of eight places, 48 numbers each and what fills up vectors


def test_workers_that_read_ahead_draw_the_same(tmp_path):
    a, b = (wb.train(small(extra=["train.steps=3", f"data.num_workers={n}"]), folder=tmp_path / str(n)) for n in (0, 2))
    assert equal(weights(a), weights(b))


def test_the_noise_is_standard_normal():
    noise = place_noise(0, "noise", 0, torch.arange(512), (4, 32, 32)).double()
    n = noise.numel()   # 2 M
    assert abs(noise.mean()) < 4 / n ** 0.5 and abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    flat = noise.flatten().numpy()
    assert abs(stats.skew(flat)) < 4 * (6 / n) ** 0.5 and abs(stats.kurtosis(flat)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    for far in (2, 3, 4):
        share = 2 * stats.norm.sf(far)
        assert abs((np.abs(flat) > far).mean() - share) < 4 * (share / n) ** 0.5, far
    # of 512 means of places, too, none is odd
    assert stats.kstest(noise.flatten(1).mean(1).numpy() * 64, "norm").pvalue > 1e-3


def test_places_steps_names_and_halves_of_a_place_have_nothing_in_common():
    places, shape = torch.arange(65), (1, 128, 128)
    draw = lambda seed=0, name="noise", step=0: place_noise(seed, name, step, places, shape).flatten(1)
    noise, most = draw(), 5 / (64 * 128 * 128) ** 0.5
    related = lambda a, b: abs(float((a * b).mean()))
    for other in (draw(seed=1), draw(name="latents"), draw(step=1)): assert related(noise[:64], other[:64]) < most
    assert related(noise[:-1], noise[1:]) < most                       # neighbouring places
    assert related(noise[:64, :-1], noise[:64, 1:]) < most             # neighbouring numbers
    first, second = noise[:64].chunk(2, 1)                             # the two numbers that share a radius
    assert related(first, second) < 2 * most and related(first ** 2 - 1, second ** 2 - 1) < 4 * most


def test_the_rarest_bits_make_finite_noise():
    class Bits:
        def random_raw(self, n): return np.resize(np.array([0, -1, -2**31, 2**31 - 1], np.int32), 2 * n).view(np.uint64)
    out = np.empty((1, 2, 16), np.float32)
    batches._normal(Bits(), out)
    assert np.isfinite(out).all() and 6 < np.abs(out).max() < 7


# --- runs of format 1

def test_format_1_draws_what_it_drew():
    exp, data = small(extra=["train.batch_format=1", "train.batch_size=32", "data.flip=true"]), Latents()
    g = torch.Generator().manual_seed(seed_of(exp.seed, "batch", 4))
    timesteps, dropped = torch.randint(1000, (32,), generator=g), torch.rand(32, generator=g)
    noise, flip, latents = (torch.randn(32, 4, 4, 3, generator=g), torch.rand(32, generator=g) < 0.5,
                            torch.randn(32, 4, 4, 3, generator=g))
    places = places_of(32, 1, 1, 2)
    batch = draw_batch(exp, data, EpochOrder(len(data), 32, exp.seed), 4, None, places=places)
    expected = {"timesteps": timesteps, "noise": noise, "flip": flip, "images": latents}
    assert dropped.shape == (32,) and all(torch.equal(batch[k], v[places]) for k, v in expected.items())


def test_a_new_run_notes_its_batch_format_and_an_older_one_keeps_its_own(tmp_path):
    here = lambda *extra: small(extra=["optim.lr_scheduler=constant", *extra])   # of which the last step is no matter
    new = wb.train(here(), folder=tmp_path / "new")
    assert new.experiment.train.batch_format == 2 and "batch_format: 2" in (new.folder / "config.yaml").read_text()
    unbroken = wb.train(here("train.batch_format=1"), folder=tmp_path / "unbroken")
    assert not equal(weights(new), weights(unbroken))
    old = wb.train(here("train.batch_format=1", "train.steps=3"), folder=tmp_path / "old")
    file = old.folder / "config.yaml"
    file.write_text(re.sub(r"  batch_format: 1\n", "", file.read_text()))   # as versions before the key wrote it
    with pytest.raises(BadInput, match="train.batch_format is 1 there and 2 here"):
        wb.train(here("train.batch_format=2"), folder=old.folder)
    longer = wb.train(here(), folder=old.folder)
    assert equal(weights(longer), weights(unbroken)) and "batch_format: 1" in file.read_text()


def test_a_batch_format_that_there_is_not():
    with pytest.raises(BadInput, match="train.batch_format is 3: expected 2, which new runs have, 1 or null"):
        small(extra=["train.batch_format=3"])


def test_the_order_of_images_is_the_same_in_both_formats():
    data = load_data("digits")
    a, b = (draw_batch(small(extra=[f"train.batch_format={n}"]), data, EpochOrder(len(data), 16, 0), 7, 10)
            for n in (1, 2))
    assert all(torch.equal(a[k], b[k]) for k in ("images", "timesteps", "class_labels"))
    assert not torch.equal(a["noise"], b["noise"])
