"Fashion-MNIST and other sets as IDX files; sources of one's own."
import gzip
import struct

import numpy as np
import pytest
import torch

import dmp_wb as wb
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import DataConfig
from dmp_wb.data import sources
from dmp_wb.data.sources import FASHION_CLASSES, ImageData, read_idx, register_source
from dmp_wb.evaluation.images import data_images


def write(folder, start, images, labels, packed=True):
    folder.mkdir(exist_ok=True)
    for name, array in ((f"{start}-images-idx3-ubyte", images), (f"{start}-labels-idx1-ubyte", labels)):
        array = np.asarray(array, np.uint8)
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pixels = np.arange(6 * 28 * 28).reshape(6, 28, 28) % 256
    write(tmp_path / "idx", "train", pixels[:4], [9, 0, 3, 3])
    write(tmp_path / "idx", "t10k", pixels[4:], [1, 2], packed=False)
    monkeypatch.setattr(sources, "FASHION_FOLDERS", (tmp_path / "idx",))
    return tmp_path / "idx"


def test_fashion_mnist_is_read_from_its_four_files(folder):
    data = wb.load_data("fashion-mnist")
    assert data.images.shape == (4, 1, 28, 28) and data.labels.tolist() == [9, 0, 3, 3]
    assert data.class_names == list(FASHION_CLASSES) and data.num_classes == 10
    assert data.images[0, 0, 0, 0] == -1 and data.images.max() == 1
    assert wb.load_data(DataConfig("fashion-mnist", split="test")).labels.tolist() == [1, 2]
    assert len(wb.load_data(DataConfig("fashion-mnist", split="all"))) == 6
    assert wb.load_data(DataConfig("fashion-mnist", conditional=False)).num_classes is None
    assert data_images(DataConfig("fashion-mnist")).num_images == 4


def test_a_folder_of_idx_files_is_named_by_its_path(folder):
    data = wb.load_data(str(folder))
    assert len(data) == 4 and data.class_names == [str(i) for i in range(10)]
    with pytest.raises(BadInput, match="data.size is 32: expected null or 28"):
        wb.load_data(DataConfig(str(folder), size=32))


def test_where_it_is_not_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_FOLDERS", (tmp_path,))
    with pytest.raises(MissingFile, match="apt-get install dataset-fashion-mnist.*zalando-datasets/fashion_mnist"):
        wb.load_data("fashion-mnist")
    with pytest.raises(BadInput, match="unknown data.split 'validation'"):
        wb.load_data(DataConfig("fashion-mnist", split="validation"))


def test_damaged_files_are_one_line_that_names_them(folder):
    file = folder / "t10k-images-idx3-ubyte"
    whole, test = file.read_bytes(), DataConfig("fashion-mnist", split="test")
    for content, said in ((whole[:-1], "has 1,583 bytes: expected 1,584"), (b"", "begins with nothing"),
                          (whole[:9], "begins with 00000803"), (b"PK" + whole, "begins with 504b0000")):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=f"t10k-images-idx3-ubyte {said}"): wb.load_data(test)
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:60])
    with pytest.raises(BadInput, match="train-images-idx3-ubyte.gz cannot be read"): wb.load_data("fashion-mnist")
    file.write_bytes(whole)
    write(folder, "t10k", np.zeros((2, 28, 28)), [1], packed=False)
    with pytest.raises(BadInput, match="2 images and 1 labels of test"): wb.load_data(test)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingFile, match="holds no t10k-labels-idx1-ubyte"): wb.load_data(test)


def test_labels_beyond_the_classes_are_refused(folder):
    write(folder, "t10k", np.zeros((1, 28, 28)), [10], packed=False)
    with pytest.raises(BadInput, match="holds label 10: expected 0 to 9"):
        wb.load_data(DataConfig("fashion-mnist", split="test"))


def test_a_source_of_ones_own_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(sources, "DATASETS", dict(sources.DATASETS))
    monkeypatch.setattr("dmp_wb.data.tables.DATASETS", sources.DATASETS)
    register_source("ones", lambda config: ImageData(torch.ones(3, 1, 8, 8), None, []), splits=("train", "test"))
    assert len(wb.load_data("ones")) == 3 and len(wb.load_data(DataConfig("ones", split="test"))) == 3
    with pytest.raises(BadInput, match="'digits' is registered already"): register_source("digits", lambda c: None)
    with pytest.raises(BadInput, match="expected a function of a DataConfig"): register_source("twos", 2)


@pytest.mark.skipif(not sources.FASHION_FOLDERS[-1].is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_files_of_the_debian_package_are_the_data_set():
    labels = read_idx(sources.FASHION_FOLDERS[-1] / "t10k-labels-idx1-ubyte.gz", 1)
    assert np.bincount(labels).tolist() == [1000] * 10
