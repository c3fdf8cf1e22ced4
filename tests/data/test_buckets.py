"Images of several shapes: sizes from a list, batches of one size, and all that comes after them."
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder_config, models, no_hub, noise_image, one_line, saved  # noqa: F401

import dmp_wb as wb
from dmp_wb.config import load_experiment
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.buckets import BucketOrder, nearest_size
from dmp_wb.data.cache import write_cache
from dmp_wb.data.images import read_size
from dmp_wb.data.load import hold_out, load_data
from dmp_wb.evaluation.images import data_images
from dmp_wb.models.dit import position_table
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint
from dmp_wb.training import loop, record
from dmp_wb.training.batches import draw_batch, places_of
from dmp_wb.training.setup import make_parts

SIZES = [[8, 8], [4, 12], [12, 4]]
SHAPES = {"square": (20, 20), "wide": (10, 30), "tall": (30, 10)}   # height and width of the images' files
TINY = ["model.patch_size=4", "model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2",
        "model.learn_sigma=false", "train.batch_size=4", "train.steps=6", "train.log_with=null", "train.log_every=2",
        "train.checkpoint_every=2", "train.ema_decay=0.5", "data.num_workers=0", "optim.lr=0.01"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Nine squares, five wide ones and three tall ones, in two classes; brightness tells which is which."
    root, number = tmp_path_factory.mktemp("data") / "photos", 0
    for shape, count in (("square", 9), ("wide", 5), ("tall", 3)):
        for i in range(count):
            file = root / "ab"[i % 2] / f"{shape}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((*SHAPES[shape], 3), 10 * number, np.uint8)).save(file)
            number += 1
    return root


def words(root, *more): return [*TINY, f"data.name={root}", f"data.size={json.dumps(SIZES)}", *more]


def train(root, *more, folder=None, name="x"):
    return wb.train(wb.Experiment(), words(root, f"name={name}", *more), folder=folder)


def state(run):
    trees = load_checkpoint(newest_checkpoint(run.folder))
    return {**trees["model"], **{f"ema.{i}": v for i, v in enumerate(trees["ema"]["shadow_params"])}}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------ sizes
def test_the_usual_list_has_at_most_the_pixels_of_the_square():
    found = wb.aspect_sizes(512, 64)
    assert found[0] == [512, 512] and len({*map(tuple, found)}) == len(found)
    assert all(h % 64 == w % 64 == 0 and 0.8 * 512**2 < h * w <= 512**2 and max(h, w) <= 2 * min(h, w)
               for h, w in found)
    assert sorted(map(tuple, found)) == sorted((w, h) for h, w in found) and [448, 576] in found
    assert wb.aspect_sizes(8, 8) == [[8, 8]] == wb.aspect_sizes(8, 4, longest=1)
    assert DataConfig(name="x", size=found).check().size == found
    for wrong in ((10, 4), (0, 1), (8, 0), (8, 4, 0.5), (8, 4, math.nan), (8.0, 4)):
        with pytest.raises(BadInput, match="expected") as e: wb.aspect_sizes(*wrong)
        assert one_line(e)


def test_an_image_gets_the_size_of_the_nearest_shape_and_of_equal_shapes_the_nearest_area():
    def pick(image, sizes): return nearest_size(np.array([image]), sizes)[0]
    for (h, w) in itertools.product((3, 10, 11, 40, 1000), repeat=2):
        ratios = [abs(math.log(h / w * b / a)) for a, b in SIZES]
        assert ratios[pick((h, w), SIZES)] == min(ratios)
    several = [[8, 8], [16, 16], [32, 32], [8, 16]]
    assert [pick(image, several) for image in ((9, 9), (17, 17), (900, 900), (10, 10), (500, 900))] == [0, 1, 2, 0, 3]


def test_sizes_are_a_list_of_sides_and_pairs_each_another():
    assert DataConfig(size=[8, [8, 12]]).check().size == [[8, 8], [8, 12]]
    assert DataConfig(size=((8,), (6, 9))).check().size == [[8, 8], [6, 9]]
    assert DataConfig(size=[[8, 8]]).check().size == 8 and DataConfig(size=[[8, 9]]).check().size == [8, 9]
    assert DataConfig(size=np.array([[8, 8], [8, 12]])).check().size == [[8, 8], [8, 12]]
    for wrong in ([[8, 8], [8, 8]], [8, [8, 8]], [[8, 8, 8], [8, 9]], [[8, 0], [8, 9]], [[]], [[8, "x"], 8],
                  [[8, 1.5]]):
        with pytest.raises(BadInput, match="data.size is .*: expected the side .* or a list of such sizes") as e:
            DataConfig(size=wrong).check()
        assert one_line(e)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_head_tells_the_size_the_right_way_up(suffix, tmp_path):
    from PIL import ImageOps
    image = Image.fromarray(np.zeros((6, 10, 3), np.uint8))
    for turned in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turned
        image.save(file := tmp_path / f"{turned}.{suffix}", exif=exif)
        with Image.open(file) as read: assert read_size(file) == ImageOps.exif_transpose(read).size[::-1], turned
        assert read_size(file.read_bytes()) == read_size(file)


# ------------------------------------------------------------------------------------------------------------ order
@pytest.mark.parametrize("counts,batch_size", [((9, 5, 3), 4), ((9, 5, 3), 16), ((64, 0, 64), 8), ((1, 1, 100), 7),
                                               ((3,), 2), ((50, 30, 20), 100)])
def test_every_batch_has_one_size_and_every_image_is_seen_equally_often(counts, batch_size):
    groups = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)])
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
    order, epochs = BucketOrder(groups, batch_size, seed=3), 3 * batch_size
    steps = epochs * len(groups) // batch_size
    batches = [order(step) for step in range(steps)]
    assert all(len(batch) == batch_size and len(groups[batch].unique()) == 1 for batch in batches)
    seen = torch.cat(batches).bincount(minlength=len(groups))
    assert seen.min() == seen.max() == epochs   # whole batches of every size: so many epochs of each image
    again = BucketOrder(groups, batch_size, seed=3)
    for step in (steps - 1, 0, steps // 2, 1): assert torch.equal(again(step), batches[step])   # without state
    assert any(not torch.equal(BucketOrder(groups, batch_size, seed=4)(s), batches[s]) for s in range(steps))


def test_a_remainder_begins_the_next_epoch_and_sizes_are_mixed():
    groups = torch.tensor([0] * 70 + [1] * 27 + [2] * 3)
    order = BucketOrder(groups, 10, seed=0)
    kinds = [int(groups[order(step)[0]]) for step in range(100)]
    assert kinds[:9].count(1) == 2 and kinds[9:19].count(1) == 3   # 27 of 54 of 81 images
    assert kinds[:9] != sorted(kinds[:9]) and kinds.count(2) == 3
    first = torch.cat([order(s) for s, kind in enumerate(kinds) if kind == 1][:3])
    assert len(first[:27].unique()) == 27   # an image comes again when all others of its size have come


def test_images_that_are_held_out_are_in_no_batch():
    groups, kept = torch.arange(40) % 3, torch.arange(0, 40, 2)
    order = BucketOrder(groups, 8, seed=0, kept=kept)
    assert set(torch.cat([order(s) for s in range(30)]).tolist()) == set(kept.tolist())
    with pytest.raises(BadInput, match="train.batch_size is 21, .* only 20 images beside those that are held out"):
        BucketOrder(groups, 21, seed=0, kept=kept)


# ------------------------------------------------------------------------------------------------------------- data
def test_a_batch_has_the_size_that_is_asked_for_and_whoever_asks_for_none_gets_the_first(photos):
    data = load_data(folder_config(photos, size=SIZES, num_workers=0))
    assert data.shape == (3, 8, 8) and data.shapes == [(3, *size) for size in SIZES]
    assert data.groups.bincount().tolist() == [9, 5, 3]
    wide = (data.groups == 1).nonzero()[:, 0]
    assert data.batch(wide, size=1)["images"].shape == (5, 3, 4, 12)
    mixed = data.batch(torch.arange(len(data)))
    assert mixed["images"].shape == (17, 3, 8, 8)
    assert torch.equal(data.batch(wide, size=1)["class_labels"], mixed["class_labels"][wide])
    alone = load_data(folder_config(photos, size=[4, 12], num_workers=0))
    assert torch.equal(data.batch(wide, size=1)["images"], alone.batch(wide)["images"])
    flip = torch.ones(5, dtype=torch.bool)
    assert torch.equal(data.batch(wide, flip, size=1)["images"], alone.batch(wide, flip)["images"])


def test_rows_archives_and_splits_have_sizes_too(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    rows = saved(tmp_path, {"image": [Image.open(file) for file in files], "label": [i % 2 for i in range(len(files))]})
    packed = shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    for split in ("train", "test"): shutil.copytree(photos, tmp_path / "splits" / split)
    config = folder_config(tmp_path / "splits", size=SIZES, validation="test")
    split = load_data(config)
    for data in (load_data(folder_config(rows, size=SIZES)), load_data(folder_config(packed, size=SIZES)), split):
        assert data.groups.bincount().tolist() == [9, 5, 3]
        assert data.batch((data.groups == 2).nonzero()[:, 0], size=2)["images"].shape == (3, 3, 12, 4)
    kept, held_out = hold_out(config, split)
    assert kept is None and held_out.source.groups.tolist() == split.groups.tolist()


def test_an_image_that_cannot_be_read_is_replaced_by_one_of_its_size(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    whole = (root / "a" / "wide-0.png").read_bytes()
    (root / "a" / "wide-0.png").write_bytes(whole[:60])   # its head is there
    (root / "a" / "wide-1.png").write_bytes(b"")          # it is not
    data = load_data(folder_config(root, size=SIZES, num_workers=0))
    names = [data.names(i) for i in range(len(data))]
    assert int(data.groups[names.index("a/wide-0.png")]) == 1 and int(data.groups[names.index("a/wide-1.png")]) == 0
    bad = names.index("a/wide-0.png")
    batch = data.batch(torch.tensor([bad]), size=1)
    after = next(i for i in range(bad + 1, len(data)) if data.groups[i] == 1)
    assert list(batch["bad_images"]) == ["a/wide-0.png"] and batch["images"].shape == (1, 3, 4, 12)
    assert torch.equal(batch["images"], data.batch(torch.tensor([after]), size=1)["images"])
    for file in root.rglob("tall-*"): file.write_bytes(file.read_bytes()[:60])
    data = load_data(folder_config(root, size=SIZES, num_workers=0))
    tall = (data.groups == 2).nonzero()[:1, 0]
    with pytest.raises(BadInput, match=r"of size \[12, 4\] can be read; the first, ./tall-.\.png, ") as e:
        data.batch(tall, size=2)
    assert one_line(e)


def test_processes_and_parts_draw_what_one_draws(photos):
    exp = wb.load_experiment("digits-quick", words(photos, "data.flip=true", "train.batch_size=8"))
    for number in (1, 2):
        exp.train.batch_format = number
        data = load_data(exp.data)
        order = BucketOrder(data.groups, 8, exp.seed)
        for step in range(5):
            whole = draw_batch(exp, data, order, step, 2)
            assert whole["noise"].shape == whole["images"].shape
            for parts, world in ((1, 2), (2, 2)):
                for rank in range(world):
                    places = places_of(8, parts, rank, world)
                    mine = draw_batch(exp, data, order, step, 2, places=places)
                    assert all(torch.equal(mine[k], whole[k][places]) for k in whole)


# --------------------------------------------------------------------------------------------------------- training
def test_a_run_is_trained_drawn_measured_resumed_and_knows_its_sizes(photos, runs_folder, tmp_path, capsys):
    more = ["train.sample_every=3", "train.sample_images=4", "train.sample_steps=2", "data.flip=true"]
    run = train(photos, *more)
    assert run.experiment.data.size == SIZES and run.experiment.model.sample_size == 8
    said = capsys.readouterr().out
    assert "sizes: 8 × 8 for 9 images, 4 × 12 for 5 images, 12 × 4 for 3 images; fewer than train.batch_size" in said
    assert Image.open(run.folder / "samples" / "step-0000003.png").size == (16, 16)
    model = wb.load_model(run.folder, device="cpu")
    assert model.config.sizes == [[4, 12], [12, 4]] and "pos_embed_4_12" not in model.state_dict()
    draw = lambda **how: wb.sample(model, class_labels=[0, 1], num_inference_steps=2, quiet=True, **how)
    assert draw().shape == (2, 3, 8, 8) and draw(size=(4, 12)).shape == (2, 3, 4, 12)
    with pytest.raises(BadInput, match="hidden_states is 3×12×8: this DiT expects 3×8×8, or 4×12, or 12×4"):
        draw(size=(12, 8))
    found = data_images(run.experiment.data)
    assert found.shape == (3, 8, 8) and found.num_images == 17   # each image, cropped to the first size


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_was_interrupted_in_an_epoch_is_equal_to_the_bit(number, photos, tmp_path, monkeypatch):
    words = ["data.validation=0.3", "train.validation_images=11", f"train.batch_format={number}"]
    whole, save = train(photos, *words, folder=tmp_path / "whole"), loop.save
    def save_and_die(state, *given):
        save(state, *given)
        if state.step == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(loop, "save", save_and_die)
        train(photos, *words, folder=tmp_path / "broken")
    again = train(photos, *words, folder=tmp_path / "broken")
    columns = ("loss", "mse", "validation_loss")
    assert [again.metrics()[k] for k in columns] == [whole.metrics()[k] for k in columns]
    assert same(state(again), state(whole))
    workers = train(photos, *words, "data.num_workers=2", folder=tmp_path / "workers")
    assert same(state(workers), state(whole))


def test_held_out_images_are_measured_in_their_own_sizes(photos, tmp_path):
    more = words(photos, "data.validation=0.4", "train.validation_images=20")
    parts = make_parts(load_experiment(wb.Experiment(), more), tmp_path)
    taken = list(record._own_places(parts))
    assert sorted(torch.cat([places for places, _ in taken]).tolist()) == list(range(20))
    found = {tuple(record.held_out_batch(parts, places)["images"].shape[2:]) for places, _ in taken}
    assert found <= {*map(tuple, SIZES)} and len(found) > 1
    # what processes measure together: each place once, and as many passes each
    for world in (2, 3):
        passes, counted = [], []
        for rank in range(world):
            class Fake: num_processes, process_index = world, rank
            mine = list(record._own_places(dataclasses.replace(parts, accelerator=Fake)))
            passes.append([len(places) for places, _ in mine])
            counted += torch.cat([places[count] for places, count in mine]).tolist()
        assert sorted(counted) == list(range(20)) and all(p == passes[0] for p in passes)


def test_one_size_in_a_list_is_that_size(photos, tmp_path):
    a, b = (wb.train(wb.Experiment(), [*TINY, f"data.name={photos}", f"data.size={size}"], folder=tmp_path / str(n))
            for n, size in enumerate(("8", "[[8, 8]]")))
    assert same(state(a), state(b)) and b.experiment.data.size == 8


def test_latents_are_encoded_in_every_size(photos, models, tmp_path):  # noqa: F811
    sizes = [[8, 8], [4, 12], [12, 4]]
    run = wb.train(wb.Experiment(), [*TINY, f"data.name={photos}", f"data.size={json.dumps(sizes)}",
                                     f"data.vae={models / 'vae'}", "model.patch_size=2", "data.flip=true"],
                   folder=tmp_path / "run")
    model = wb.load_model(run.folder, device="cpu")
    assert model.input_sizes == [(4, 4), (2, 6), (6, 2)]
    config = folder_config(photos, size=sizes, vae=str(models / "vae"))
    data = load_data(config)
    assert data.shapes == [(4, 4, 4), (4, 2, 6), (4, 6, 2)]
    wide = (data.groups == 1).nonzero()[:, 0]
    assert data.encode(data.batch(wide, size=1))["images"].shape == (5, 4, 2, 6)
    with pytest.raises(BadInput, match="expected one size, a cache holds latents of one shape") as e:
        write_cache(config, tmp_path / "latents")
    assert one_line(e)
    with pytest.raises(BadInput, match=r"data.size is \[4, 11\]: expected a multiple of 2 for VAE"):
        load_data(folder_config(photos, size=[8, [4, 11]], vae=str(models / "vae")))


# ------------------------------------------------------------------------------------------------- models and methods
def test_positions_of_another_size_are_those_of_a_model_of_that_size():
    torch.manual_seed(0)
    several = wb.DiT(sample_size=8, patch_size=2, hidden_size=16, num_layers=2, num_attention_heads=2, num_classes=3,
                     sizes=[[4, 12]])
    with torch.no_grad():
        for p in several.parameters(): p.normal_(0, 0.1)
    wide = wb.DiT(sample_size=(4, 12), patch_size=2, hidden_size=16, num_layers=2, num_attention_heads=2, num_classes=3)
    wide.load_state_dict({**several.state_dict(), "pos_embed": position_table(16, (2, 6))})
    x, t, y = torch.randn(2, 4, 4, 12), torch.tensor([3, 4]), torch.tensor([0, 2])
    assert torch.equal(several(x, t, y).sample, wide(x, t, y).sample)
    half = several.to(torch.bfloat16)
    assert half(x.bfloat16(), t, y).sample.dtype == torch.bfloat16


def test_a_compiled_model_has_a_graph_for_each_size_and_no_break():
    model = wb.DiT(sample_size=8, in_channels=1, hidden_size=16, num_layers=1, num_attention_heads=2, sizes=[[4, 12]])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = dict(torch._dynamo.utils.counters["stats"])
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.1)
        for size in ((8, 8), (4, 12), (8, 8)):
            x = torch.randn(2, 1, *size)
            assert torch.allclose(compiled(x, torch.tensor([3, 5])).sample, model(x, torch.tensor([3, 5])).sample)
    after = torch._dynamo.utils.counters["stats"]
    assert after["unique_graphs"] - before.get("unique_graphs", 0) == 2


def test_sizes_are_saved_with_a_model_and_a_plain_one_takes_one(tmp_path):
    plain = wb.DiT(sample_size=8, hidden_size=16, num_layers=1, num_attention_heads=2)
    assert plain.config.sizes is None
    with pytest.raises(BadInput, match="hidden_states is 4×4×12: this DiT expects 4×8×8$"):
        plain(torch.zeros(1, 4, 4, 12), 0)
    plain.take_sizes([(4, 12), (8, 8)])
    plain.save_pretrained(tmp_path)
    again = wb.DiT.from_pretrained(tmp_path)
    x = torch.randn(1, 4, 4, 12)
    assert again.config.sizes == [[4, 12]] and torch.equal(again(x, 5).sample, plain(x, 5).sample)
    with pytest.raises(BadInput, match="inputs are 5 × 8: expected multiples of patch_size 2"):
        plain.take_sizes([(5, 8)])
    from_before = json.loads((tmp_path / "config.json").read_text())
    del from_before["sizes"]
    (tmp_path / "config.json").write_text(json.dumps(from_before))
    assert wb.DiT.from_pretrained(tmp_path).input_sizes == [(8, 8)]


@pytest.fixture(scope="module")
def base(photos, tmp_path_factory): return train(photos, folder=tmp_path_factory.mktemp("base") / "base").folder


@pytest.mark.parametrize("method", ["dmp.mode=prepend methods.dmp.num_prompts=3", "dtr.sharing_ratio=0.5",
                                    "tlora.rank=2", "lmask.knots=3", "switch.num_experts=2"])
def test_methods_that_act_on_any_size_train_and_draw_in_every_size(method, photos, base, tmp_path):
    more = [f"methods.{word}" if n == 0 else word for n, word in enumerate(method.split())]
    more += [f"base={base}"] if method.split(".")[0] in ("dmp", "tlora") else []
    run = train(photos, *more, "train.steps=4", folder=tmp_path / "run")
    model = wb.load_model(run.folder, device="cpu")
    for size in SIZES:
        drawn = wb.sample(model, class_labels=[0], num_inference_steps=2, size=tuple(size), quiet=True)
        assert drawn.shape[2:] == tuple(size) and drawn.isfinite().all()


def test_what_acts_on_places_of_one_size_is_refused_in_one_line(photos, base, tmp_path):
    for more in ([], ["methods.dmp.num_prompts=2"]):   # 4 × 12 and 12 × 4 have as many tokens, at other places
        with pytest.raises(BadInput, match=r"data.size has \[4, 12\], which the model, a DiT with dmp, cannot be "
                                           r"called with: the input has 3 tokens \(1 × 3\) .* mode 'prepend'") as e:
            train(photos, "methods.dmp.mode=add", *more, f"base={base}", folder=tmp_path / "run")
        assert one_line(e) and not (tmp_path / "run").exists()


def test_a_frozen_base_has_the_sizes_already_and_one_that_trains_gets_them(photos, tmp_path):
    squares = wb.train(wb.Experiment(), [*TINY, f"data.name={photos}", "data.size=8"], folder=tmp_path / "squares")
    with pytest.raises(BadInput, match=r"data.size has \[4, 12\], but base .*squares stays as it is and was trained on "
                                       "8×8 alone: expected its sizes") as e:
        train(photos, "methods.tlora.rank=2", f"base={squares.folder}", folder=tmp_path / "patch")
    assert one_line(e)
    tuned = train(photos, f"base={squares.folder}", folder=tmp_path / "tuned")
    assert wb.load_model(tuned.folder, device="cpu").config.sizes == [[4, 12], [12, 4]]


def test_sizes_that_do_not_work_are_one_line(photos, tmp_path):
    for size, said in (("[[8, 8], [6, 12]]", r"data.size is .*: inputs are 6 × 12: expected multiples of patch_size 4"),
                       ("[[8, 8], [8, 8]]", "each another"), ("[[12, 4], [8, 8]]", None)):
        if said is None:   # the first is the model's own, in whatever shape
            run = wb.train(wb.Experiment(), [*TINY, f"data.name={photos}", f"data.size={size}"], folder=tmp_path / "a")
            assert run.experiment.model.sample_size == [12, 4]
            continue
        with pytest.raises(BadInput, match=said) as e:
            wb.train(wb.Experiment(), [*TINY, f"data.name={photos}", f"data.size={size}"], folder=tmp_path / "b")
        assert one_line(e)
    with pytest.raises(BadInput, match=r"data.size is \[\[8, 8\], \[4, 12\]\]: expected null or 8, the size of"):
        load_data(DataConfig(size=[[8, 8], [4, 12]]))
    with pytest.raises(BadInput, match="train.batch_size is 18, but the data set has only 17 images"):
        train(photos, "train.batch_size=18", folder=tmp_path / "c")


def test_one_image_of_a_shape_and_a_size_without_images(tmp_path):
    for i in range(8): noise_image(i).resize((10, 10)).save(tmp_path / f"{i}.png")
    noise_image(9).resize((20, 5)).save(tmp_path / "9.png")
    run = train(tmp_path, "train.steps=12", folder=tmp_path.parent / "run")
    assert run.finished and all(math.isfinite(v) for v in run.metrics()["loss"])
