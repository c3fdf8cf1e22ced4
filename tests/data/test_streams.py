"Data sets that are read as they come: their order, what is held out, what a run that goes on sees, what is refused."
import dataclasses
import io
import json
import multiprocessing
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import models, no_hub, one_line  # noqa: F401

import dmp_wb as wb
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.load import hold_out, load_data
from dmp_wb.data.streams import Stream
from dmp_wb.evaluation.images import data_images
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint
from dmp_wb.training import loop
from dmp_wb.training.batches import batches, draw_batch, places_of, Steps

datasets.disable_progress_bars()
NAMES = ["cat", "dog", "owl"]
TINY = ["model.patch_size=4", "model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2",
        "model.learn_sigma=false", "train.batch_size=4", "train.steps=6", "train.log_with=null", "train.log_every=2",
        "train.checkpoint_every=2", "train.ema_decay=0.5", "data.num_workers=0", "optim.lr=0.01"]


def png(number):
    "An image whose brightness is its number."
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(out, "PNG")
    return out.getvalue()


def parquet(folder, parts=(30, 25, 15), labels=True, bad=(), features=None, **columns):
    "Shards of images that are numbered through, with classes in turn and a caption; those in `bad` hold no image."
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, count in enumerate(parts):
        numbers = range(first, first + count)
        rows = {"image": [{"bytes": b"no image" if n in bad else png(n), "path": None} for n in numbers],
                "text": [f"number {n}" for n in numbers]}
        kinds = {"image": datasets.Image(), "text": datasets.Value("string")}
        if labels: rows["label"], kinds["label"] = [n % 3 for n in numbers], datasets.ClassLabel(names=NAMES)
        rows |= {k: [values[n] for n in numbers] for k, values in columns.items()}
        kinds |= features or {}
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(folder / f"{shard}.parquet")
        first += count
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory): return parquet(tmp_path_factory.mktemp("stream") / "table")   # 70 images


def config(folder, **changes):
    usual = dict(name=str(folder), size=8, streaming=True, shuffle_buffer=8, first_images=10)
    return DataConfig(**(usual | changes))


def numbers(batch): return ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def drawn(stream, steps, size=4, seed=0):
    order = stream.order(size, seed)
    return [n for step in steps for n in numbers(stream.batch(order(step)))]


def words(folder, *more):
    return [*TINY, f"data.name={folder}", "data.size=8", "data.streaming=true", "data.shuffle_buffer=8",
            "data.first_images=10", *more]


def train(folder, *more, to, name="x"):
    return wb.train(wb.Experiment(), words(folder, f"name={name}", *more), folder=to)


def state(run):
    trees = load_checkpoint(newest_checkpoint(run.folder))
    return {**trees["model"], **{f"ema.{i}": v for i, v in enumerate(trees["ema"]["shadow_params"])}}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------- order
def test_a_buffer_of_one_gives_the_images_of_the_list_in_its_order(table):
    indexed, stream = load_data(config(table, streaming=False)), Stream(config(table, shuffle_buffer=1))
    order = stream.order(7, 0)
    for step in range(10):
        flip = torch.arange(7) % 2 == 0
        one, other = stream.batch(order(step), flip), indexed.batch(torch.arange(7 * step, 7 * step + 7), flip)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert drawn(stream, [10], 7) == list(range(7)) and stream.class_names == NAMES


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(table):
    seen = drawn(Stream(config(table)), range(30), 7)
    epochs = [seen[i:i + 70] for i in (0, 70, 140)]
    assert all(sorted(epoch) == list(range(70)) for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 3 and drawn(Stream(config(table)), range(10), 7, seed=1) != epochs[0]
    firsts = {tuple(dict.fromkeys(n // 30 if n < 30 else 1 + (n >= 55) for n in epoch)) for epoch in epochs}
    assert len(firsts) > 1   # of shards


def test_any_step_is_found_by_a_stream_that_has_seen_none(table):
    unbroken, order = Stream(config(table)), Stream(config(table)).order(9, 3)
    unbroken.order(9, 3)
    steps = [numbers(unbroken.batch(order(step))) for step in range(24)]
    for step in (23, 5, 8, 22, 0):
        fresh = Stream(config(table))
        fresh.order(9, 3)
        assert numbers(fresh.batch(order(step))) == steps[step] == numbers(unbroken.batch(order(step)))


def test_processes_have_shares_of_a_batch_that_are_disjoint(table):
    exp, data = wb.Experiment(), Stream(config(table))
    order = data.order(8, 0)
    exp.data.flip = True
    for step in (0, 11):
        whole = draw_batch(exp, data, order, step, null_class=3)
        parts = []
        for rank in (0, 1):
            own = Stream(config(table))
            own.order(8, 0)
            parts.append(draw_batch(exp, own, order, step, null_class=3, places=places_of(8, 1, rank, 2)))
        assert not {*numbers(parts[0])} & {*numbers(parts[1])} and {*numbers(whole)} == {*sum(map(numbers, parts), [])}
        assert all(torch.equal(whole[k], torch.cat([p[k] for p in parts])) for k in whole)


def test_a_worker_reads_the_same_also_when_it_is_spawned(table):
    exp, data = wb.Experiment(), Stream(config(table))
    order = data.order(4, 0)
    steps = Steps(exp, data, order, null_class=3)
    alone = [steps[n]["images"] for n in range(20)]
    ahead = [b["images"] for b in batches(steps, 0, 20, 1, torch.device("cpu"))]
    assert all(map(torch.equal, alone, ahead))
    again = pickle.loads(pickle.dumps(steps))   # with a block in memory and a file open
    assert torch.equal(again[17]["images"], alone[17]) and "fork" in multiprocessing.get_all_start_methods()


# ----------------------------------------------------------------------------------------------------------- training
def test_a_run_that_goes_on_is_to_the_bit_what_an_unbroken_one_is(table, tmp_path, monkeypatch):
    whole, take = train(table, "train.steps=20", to=tmp_path / "a"), loop.Books.take

    def killed(books, *args):
        if books.state.step == 19: raise KeyboardInterrupt
        return take(books, *args)
    monkeypatch.setattr(loop.Books, "take", killed)
    with pytest.raises(KeyboardInterrupt): train(table, "train.steps=20", to=tmp_path / "b")
    monkeypatch.undo()
    broken = train(table, "train.steps=20", to=tmp_path / "b")   # from step 18, in the second epoch
    assert same(state(whole), state(broken)) and whole.experiment.model.num_classes == 3
    other = train(table, "train.steps=20", "data.shuffle_buffer=9", to=tmp_path / "c")
    assert not same(state(whole), state(other))


def test_the_first_images_are_held_out_and_never_trained_on(table, tmp_path):
    given = config(table, validation=40)
    data = load_data(given)
    kept, held = hold_out(given, data)
    assert kept is None and numbers(data.batch(held.indices)) == list(range(40))
    seen = drawn(data, range(20), 6)
    assert sorted(seen[:30]) == list(range(40, 70)) and {*seen} == {*range(40, 70)}
    run = train(table, "data.validation=40", "train.validation_every=3", to=tmp_path / "x")
    assert len([v for v in run.metrics()["validation_loss"] if v is not None]) >= 2
    with pytest.raises(BadInput, match="batch_size is 4, but the data set has only 0 images beside those"):
        train(table, "data.validation=70", to=tmp_path / "y")
    with pytest.raises(BadInput, match="data.validation is 71, but .* has only 70 images"):
        train(table, "data.validation=71", to=tmp_path / "z")


def test_another_split_is_held_out(tmp_path):
    root = tmp_path / "both"
    parquet(root, (20,)), (root / "0.parquet").rename(root / "train.parquet")
    parquet(root, (8,)), (root / "0.parquet").rename(root / "test.parquet")
    given = config(root, validation="test")
    kept, held = hold_out(given, load_data(given))
    assert kept is None and len(held.indices) == 8 and held.source.config.split == "test"


# ---------------------------------------------------------------------------------------------------- what is measured
def test_the_first_images_stand_for_a_stream_and_that_is_said(table, capsys):
    data = load_data(config(table, caption_column=None))
    assert len(data) == 10 and numbers(data.batch(torch.arange(10))) == list(range(10))
    assert capsys.readouterr().err.count("the first 10 images of") == 1
    measured = data_images(config(table))
    assert torch.equal(torch.cat(list(measured.batches(4))), data.batch(torch.arange(10))["images"])


# ---------------------------------------------------------------------------------------------------- kinds of streams
def test_shards_of_webdataset_are_read_with_labels_and_captions(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for n in range(6 * shard, 6 * shard + 6):
                for suffix, content in (("png", png(n)), ("cls", str(n % 3).encode()), ("txt", f"no. {n}".encode())):
                    member = tarfile.TarInfo(f"{n:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    given = config(root, image_column="png", label_column="cls", caption_column="txt", classes=NAMES, shuffle_buffer=4)
    for name, count in ((root, 12), (root / "1.tar", 6)):
        data = Stream(dataclasses.replace(given, name=str(name)))
        order = data.order(6, 0)
        found = [data.batch(order(step)) for step in range(count // 6)]
        for batch in found:
            assert batch["class_labels"].tolist() == [n % 3 for n in numbers(batch)]
            assert batch["captions"] == [f"no. {n}" for n in numbers(batch)]
        assert len({n for batch in found for n in numbers(batch)}) == count and data.class_names == NAMES


def test_what_save_to_disk_wrote_is_streamed_too(tmp_path, table):
    rows = datasets.load_dataset(str(table), split="train")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert sorted(drawn(Stream(config(tmp_path / name)), range(10), 7)) == list(range(70))


def test_captions_that_are_dropped_are_empty(table):
    data = Stream(config(table, caption_column="text"))
    batch = data.batch(data.order(6, 0)(2), None, None, torch.tensor([True, False] * 3))
    assert batch["captions"] == ["" if i % 2 == 0 else f"number {n}" for i, n in enumerate(numbers(batch))]
    assert data.captions(3) == "number 3"


def test_an_image_that_cannot_be_read_is_named_and_replaced_by_another_of_its_block(tmp_path):
    root = parquet(tmp_path / "bad", (20,), bad=(3, 11))
    data = Stream(config(root, shuffle_buffer=5))
    order = data.order(10, 0)
    met = [data.batch(order(step)) for step in range(2)]
    named = {name for batch in met for name in batch.get("bad_images", {})}
    assert named == {"example 3", "example 11"}
    assert {n for batch in met for n in numbers(batch)} == {*range(20)} - {3, 11}
    with pytest.raises(BadInput, match="2 images cannot be read, more than data.max_bad_images, 1"):
        train(root, "data.max_bad_images=1", to=tmp_path / "x")


# ------------------------------------------------------------------------------------------------------------- refused
def test_a_stream_shorter_than_a_batch_is_refused_and_an_empty_one_is(tmp_path):
    root = parquet(tmp_path / "few", (3,))
    with pytest.raises(BadInput, match="batch_size is 4, but the data set has only 3 images"):
        train(root, to=tmp_path / "x")
    assert drawn(Stream(config(root, shuffle_buffer=1)), [0, 1], 3) == [0, 1, 2, 0, 1, 2]
    root = parquet(tmp_path / "none", (0,))
    with pytest.raises(BadInput, match="has only 0 images|is empty") as error: train(root, to=tmp_path / "y")
    assert one_line(error)
    with pytest.raises(BadInput, match="is empty: expected images"): len(Stream(config(root)))


@pytest.mark.parametrize("change, said", [
    ({"image_column": "picture"}, "data.image_column 'picture'"), ({"caption_column": "words"}, "data.caption_column"),
    ({"image_column": "text"}, "'text' holds .*: expected images"),
    ({"label_column": "kind"}, "data.label_column 'kind'"),
    ({"caption_column": "image"}, "expected strings"), ({"split": "test"}, "data.split"),
    ({"classes": ["a", "b", "c"]}, "data.classes is .*: expected null, or the names")])
def test_columns_and_splits_that_are_not_there_are_named(table, change, said):
    with pytest.raises(BadInput, match=said) as error: load_data(config(table, **change))
    assert one_line(error)


def test_labels_without_names_need_their_number_or_names(tmp_path):
    root = parquet(tmp_path / "t", (12,), labels=False, kind=[n % 3 for n in range(12)],
                   word=[NAMES[n % 3] for n in range(12)],
                   features={"kind": datasets.Value("int64"), "word": datasets.Value("string")})
    for column, wanted in (("kind", "their number or names"), ("word", "their names")):
        with pytest.raises(BadInput, match=f"does not name its classes: expected {wanted}"):
            load_data(config(root, label_column=column))
    with pytest.raises(BadInput, match="does not name"): load_data(config(root, label_column="word", classes=3))
    for column, classes in (("kind", 3), ("kind", NAMES), ("word", NAMES)):
        data = load_data(config(root, label_column=column, classes=classes))
        batch = data.batch(data.order(6, 0)(0))
        assert batch["class_labels"].tolist() == [n % 3 for n in numbers(batch)] and data.num_classes == 3
    for column, classes in (("kind", 2), ("word", NAMES[:2])):
        data = load_data(config(root, label_column=column, classes=classes))
        with pytest.raises(BadInput, match=r"label .* of example \d+ is none of the 2 classes") as error:
            data.batch(data.order(12, 0)(0))
        assert one_line(error)
    assert load_data(config(root)).num_classes is None   # there is no column label
    assert "class_labels" not in load_data(config(root, label_column="kind", conditional=False)).batch(torch.arange(3))


@pytest.mark.parametrize("change, said", [
    ({"size": [[8, 8], [4, 12]]}, "expected one size with data.streaming"), ({"num_workers": 2}, "expected 0 or 1"),
    ({"validation": 0.1}, "whose length is not known"), ({"validation": 0}, "expected a number of images"),
    ({"split": "all"}, "expected the name of one split"), ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
    ({"first_images": 0}, "data.first_images is 0"), ({"classes": ["a", "a"]}, "each another"),
    ({"classes": 0}, "how many there are"), ({"streaming": False, "classes": 3}, "expected null without"),
    ({"streaming": False, "validation": 20}, "expected a share"), ({"name": "digits"}, "digits is in memory"),
    ({"size": None}, "data.size is null"), ({"name": "no/such/folder"}, "there is no such file or folder")])
def test_what_a_stream_cannot_do_is_one_line(table, change, said):
    with pytest.raises((BadInput, MissingFile), match=said) as error: load_data(config(table, **change))
    assert one_line(error)


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_one_line(no_hub):  # noqa: F811
    with pytest.raises(BadInput, match="data.name is 'nobody/none', which datasets cannot stream") as error:
        load_data(config("nobody/none"))
    assert one_line(error)


def test_a_cache_is_not_made_of_a_stream(table, tmp_path):
    with pytest.raises(BadInput, match="data.streaming is true: expected false"):
        write_cache(config(table, vae="x"), tmp_path / "cache")


def test_a_file_that_is_cut_off_is_one_line(tmp_path):
    root = parquet(tmp_path / "cut", (200, 5))
    file = root / "1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match="broke off while it was read|cannot stream") as error:
        drawn(Stream(config(root)), range(60))
    assert one_line(error)


def test_latents_are_encoded_of_a_stream(table, models):  # noqa: F811
    data = load_data(config(table, vae=str(models / "vae"), size=16, conditional=False))
    assert data.stream is not None and data.random_latents
    order = data.stream.order(4, 0)
    exp = wb.Experiment()
    batch = draw_batch(exp, data, order, 3, null_class=None)
    assert data.encode(batch)["images"].shape == (4, *data.shape)


def test_numbers_and_lists_of_the_command_line_are_taken(table, tmp_path):
    run = train(table, "data.validation=5", "data.classes=" + json.dumps(NAMES), to=tmp_path / "x")
    assert run.experiment.data.validation == 5 and type(run.experiment.data.validation) is int
    assert run.experiment.data.classes == NAMES
    with pytest.raises(BadInput, match="data.validation is 0.2: expected a number of images"):
        train(table, "data.validation=0.2", to=tmp_path / "y")
