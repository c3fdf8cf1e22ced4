"Labels that are words, and captions in files beside the images."
import json
import warnings

import datasets
import pytest
import torch
from test_data import folder_config, models, no_hub, noise_image, one_line, photos, saved  # noqa: F401

from dmp_wb.core.errors import BadInput
from dmp_wb.data.cache import write_cache
from dmp_wb.data.folders import image_folder, SkippedImages
from dmp_wb.data.load import load_data
from dmp_wb.data.tables import hub_data, load_images

IMAGES = [noise_image(i) for i in range(4)]


# --- labels

@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_words_are_classes_in_sorted_order(kind, tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": ["rose", "aster", "rose", "lily"]},
                 {"label": datasets.Value(kind)})
    data = hub_data(folder_config(name))
    assert data.class_names == ["aster", "lily", "rose"] and data.labels.tolist() == [2, 0, 2, 1]
    assert data.batch(torch.tensor([1, 3]))["class_labels"].tolist() == [0, 1]
    assert hub_data(folder_config(name, conditional=False)).labels is None


def test_a_label_that_is_empty_is_missing(tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": ["rose", "", "rose", "lily"]})
    with pytest.raises(BadInput, match="the label of row 1 is missing: expected one for every image") as e:
        hub_data(folder_config(name))
    assert one_line(e)


def test_splits_share_the_words_of_train(tmp_path):
    def rows(labels): return datasets.Dataset.from_dict({"image": IMAGES[:len(labels)], "label": labels}).cast_column(
        "image", datasets.Image())
    datasets.DatasetDict(train=rows(["rose", "aster", "lily"]), test=rows(["rose"]),
                         other=rows(["tulip"])).save_to_disk(tmp_path / "flowers")
    test = hub_data(folder_config(tmp_path / "flowers", split="test"))
    assert test.class_names == ["aster", "lily", "rose"] and test.labels.tolist() == [2]
    with pytest.raises(BadInput, match="data.label_column 'label' holds class 'tulip' in split 'other', but not in "
                                       "train: expected the classes of train") as e:
        hub_data(folder_config(tmp_path / "flowers", split="other"))
    assert one_line(e)
    assert hub_data(folder_config(tmp_path / "flowers", split="all")).class_names == ["aster", "lily", "rose", "tulip"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_words_in_metadata_are_classes_where_their_column_is_named(kind, tmp_path):
    root = photos(tmp_path / "photos", 4, ("train", "test"))
    rows = [("train/00.png", "rose"), ("train/01.png", "aster"), ("test/02.png", "rose"), ("test/03.png", "rose")]
    if kind == "csv": text = "file_name,species\n" + "".join(f"{a},{b}\n" for a, b in rows)
    else: text = "".join(json.dumps({"file_name": a, "species": b}) + "\n" for a, b in rows)
    (root / f"metadata.{kind}").write_text(text)
    for split, labels in (("train", [1, 0]), ("test", [1, 1])):   # aster is a class of test, too
        data = load_images(folder_config(root, label_column="species", split=split))
        assert data.class_names == ["aster", "rose"] and data.labels.tolist() == labels
    assert load_images(folder_config(root)).labels is None   # as ever
    with pytest.raises(BadInput, match="unknown data.label_column 'specie': did you mean 'species'"):
        load_images(folder_config(root, label_column="specie"))


def test_numbers_in_a_csv_stay_numbers_and_words_beside_them_are_words(tmp_path):
    root = photos(tmp_path / "photos", 3, None)
    for labels, names in (("201", ["0", "1", "2"]), ("2x1", ["1", "2", "x"])):
        (root / "metadata.csv").write_text(
            "file_name,kind\n" + "".join(f"{i:02d}.png,{label}\n" for i, label in enumerate(labels)))
        data = load_images(folder_config(root, label_column="kind"))
        assert data.class_names == names and [data.class_names[i] for i in data.labels] == list(labels)


def test_whether_labels_are_words_does_not_depend_on_the_split(tmp_path):
    root = photos(tmp_path / "photos", 4, ("train", "test"))
    (root / "metadata.csv").write_text("file_name,kind\ntrain/00.png,1\ntrain/01.png,x\ntest/02.png,1\ntest/03.png,1\n")
    test = load_images(folder_config(root, label_column="kind", split="test"))
    assert test.class_names == ["1", "x"] and test.labels.tolist() == [0, 0]


# --- captions

def captioned(root, texts, suffix="txt"):
    for i, text in enumerate(texts):
        if text is not None: next(root.rglob(f"{i:02d}.png")).with_suffix(f".{suffix}").write_bytes(text)
    return root


@pytest.mark.parametrize("suffix", ["txt", "caption"])
def test_captions_are_read_from_a_file_beside_each_image(suffix, tmp_path):
    root = captioned(photos(tmp_path / "photos", 4), [b"a cat\n", "\ufefftwo\n  cats".encode(), b"a dog", b""], suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_images(folder_config(root, caption_column=suffix))
    batch = data.batch(torch.arange(4), drop=torch.tensor([False, False, True, False]))
    assert batch["captions"] == ["a cat", "two cats", "", ""] and batch["class_labels"].tolist() == [0, 0, 1, 1]
    assert torch.equal(batch["images"], image_folder(folder_config(root)).batch(torch.arange(4))["images"])
    assert load_images(folder_config(root)).captions is None


def test_an_image_without_a_caption_is_told_and_has_an_empty_one(tmp_path):
    root = captioned(photos(tmp_path / "photos", 3, None), [b"a cat", None, b"a dog"])
    with pytest.warns(UserWarning, match=r"1 of the 3 images in .* have no \.txt file beside them, so their "
                                         r"captions are empty; the first, 01\.png: expected 01\.txt"):
        data = load_images(folder_config(root, caption_column="txt"))
    assert data.batch(torch.arange(3))["captions"] == ["a cat", "", "a dog"]


def test_captions_that_are_not_there_are_refused_in_one_line(tmp_path):
    root = photos(tmp_path / "photos", 3, None)
    with pytest.raises(BadInput, match=r"holds no \.txt file beside any of its 3 images; the first, 00\.png: expected "
                                       r"00\.txt") as e:
        load_images(folder_config(root, caption_column="txt"))
    assert one_line(e)
    captioned(root, [b"a", b"b", b"c"])
    with pytest.raises(BadInput, match="unknown data.caption_column 'text': did you mean 'txt'") as e:
        load_images(folder_config(root, caption_column="text"))
    assert one_line(e)


def test_a_caption_that_cannot_be_read_leaves_its_image_out_whether_it_is_dropped_or_not(tmp_path):
    root = captioned(photos(tmp_path / "photos", 3, None), [b"a", b"\xff\xfe\xfa", b"c"])
    for drop in (None, torch.ones(2, dtype=torch.bool)):
        said = []
        data = load_images(folder_config(root, caption_column="txt"))
        batch = SkippedImages(1, said.append).take(data.batch(torch.tensor([1, 0]), drop=drop))
        assert torch.equal(batch["images"][0], data.image(2))
        assert said == ["skipped image 1: 01.png has 01.txt beside it, which is no UTF-8"]


def test_captions_beside_images_are_encoded_in_the_loop_and_in_a_cache(models, tmp_path):  # noqa: F811
    root = captioned(photos(tmp_path / "photos", 3, None), [b"a cat", b"a dog", b"cat"])
    config = folder_config(root, caption_column="txt", text_encoder=str(models / "clip"), vae=str(models / "vae"))
    data, cache = load_data(config), write_cache(config, tmp_path / "latents", 2)
    drawn = data.encode(data.batch(torch.arange(3)))["encoder_hidden_states"]
    assert torch.allclose(drawn, cache.batch(torch.arange(3))["encoder_hidden_states"], atol=1e-5)
