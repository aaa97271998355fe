"""The loaders read what the data sets are distributed as, and name damaged files."""

import gzip
import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

import loaders

RNG = np.random.default_rng(0)


# --- Files as they are distributed ----------------------------------------------------


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_mnist(directory, name=lambda part, k: f"{part}-idx{k}-ubyte", write=None):
    """Four files; returns what is in them."""
    arrays = []
    for part, n in (("train", 5), ("t10k", 3)):
        for what, shape, high in (("images", (n, 28, 28), 256), ("labels", (n,), 10)):
            array = RNG.integers(0, high, shape, dtype=np.uint8)
            path = directory / name(f"{part}-{what}", len(shape))
            path.write_bytes((write or bytes)(idx(array)))
            arrays.append(array)
    return arrays


class Cifar:
    """The files of CIFAR-10 or -100 in one version, with two images in each."""

    def __init__(self, classes, binary):
        ten = classes == 10
        end, suffix = ("batches-bin", ".bin") if binary else ("batches-py", "")
        kind = "binary" if binary else "python"
        self.classes = classes
        self.archive = f"cifar-{classes}-{kind}.tar.gz"
        self.folder = f"cifar-10-{end}" if ten else f"cifar-100-{kind}"
        names = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
        names.append("test_batch" if ten else "test")
        self.images = RNG.integers(0, 256, (len(names), 2, 32, 32, 3), dtype=np.uint8)
        self.labels = RNG.integers(0, classes, (len(names), 2), dtype=np.uint8)
        parts = zip(names, self.images, self.labels, strict=True)
        write = self._binary if binary else self._pickle
        self.files = {name + suffix: write(x, y) for name, x, y in parts}
        self.load = loaders.load_cifar10 if ten else loaders.load_cifar100

    def _rows(self, images):
        return images.transpose(0, 3, 1, 2).reshape(len(images), -1)

    def _binary(self, images, labels):
        columns = [labels[:, None], self._rows(images)]
        if self.classes == 100:
            columns.insert(0, labels[:, None] % 20)  # coarse labels come first
        return np.concatenate(columns, axis=1).tobytes()

    def _pickle(self, images, labels):
        key = b"labels" if self.classes == 10 else b"fine_labels"
        content = {b"data": self._rows(images), key: labels.tolist()}
        content |= {b"filenames": [b"a.png", b"b.png"], b"batch_label": b"one"}
        # As NumPy 1 named its module, in files of Python 2.
        return pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core")

    def write(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (directory / name).write_bytes(data)

    def write_archive(self, directory):
        with tarfile.open(directory / self.archive, "w:gz") as tar:
            for name, data in self.files.items():
                member = tarfile.TarInfo(f"{self.folder}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def assert_loaded(self, directory):
        data = self.load(directory)
        np.testing.assert_array_equal(data.train_x, np.concatenate(self.images[:-1]))
        np.testing.assert_array_equal(data.train_y, np.concatenate(self.labels[:-1]))
        np.testing.assert_array_equal(data.test_x, self.images[-1])
        np.testing.assert_array_equal(data.test_y, self.labels[-1])
        assert data.train_y.dtype == np.int32


@pytest.fixture(params=[(10, False), (10, True), (100, False), (100, True)])
def cifar(request):
    return Cifar(*request.param)


# --- They are read --------------------------------------------------------------------


def test_mnist_is_read_gzipped_or_not_and_by_both_names(tmp_path):
    cases = [
        ({}, "plain"),
        ({"name": lambda part, k: f"{part}.idx{k}-ubyte"}, "dots"),
        (
            {"name": lambda part, k: f"{part}-idx{k}-ubyte.gz", "write": gzip.compress},
            "gz",
        ),
    ]
    for options, name in cases:
        directory = tmp_path / name
        directory.mkdir()
        expected = write_mnist(directory, **options)
        for actual, array in zip(loaders.load_mnist(directory), expected, strict=True):
            np.testing.assert_array_equal(actual, array)
        images, labels = loaders.load_mnist_test(str(directory))
        np.testing.assert_array_equal(images, expected[2])
        np.testing.assert_array_equal(labels, expected[3])


def test_mnist_test_set_is_read_from_npz(tmp_path):
    image = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    label = np.array([3, 1, 4, 1], np.uint8)
    np.savez_compressed(tmp_path / "mnist_t10k.npz", image=image, label=label)
    images, labels = loaders.load_mnist_test(tmp_path)
    np.testing.assert_array_equal(images, image)
    np.testing.assert_array_equal(labels, label)


def test_cifar_is_read_from_the_archive_and_unpacked(cifar, tmp_path):
    for name in ("archive", "folder", "inside"):
        (tmp_path / name).mkdir()
    cifar.write_archive(tmp_path / "archive")
    cifar.write(tmp_path / "folder" / cifar.folder)
    cifar.write(tmp_path / "inside")
    for name in ("archive", "folder", "inside"):
        cifar.assert_loaded(tmp_path / name)


def jpegs(n):
    files = []
    for level in range(n):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * level, 10, 200)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def write_jpegs(directory, damage=lambda data: data):
    arrays = {}
    for part, n in (("train", 4), ("test", 2)):
        files = jpegs(n)
        data = np.frombuffer(damage(b"".join(files)), np.uint8)
        offset = np.cumsum([0, *map(len, files)])
        label = np.arange(n, dtype=np.uint8)
        parts = {"jpeg": data, "offset": offset, "label": label}
        arrays |= {f"{part}_{key}": array for key, array in parts.items()}
    np.savez(directory / "cifar10_jpeg.npz", **arrays)


def test_cifar_is_read_from_jpegs(tmp_path):
    write_jpegs(tmp_path)
    data = loaders.load_cifar10(tmp_path)
    assert data.train_x.shape == (4, 32, 32, 3)
    assert data.train_y.tolist() == [0, 1, 2, 3]
    assert data.test_y.tolist() == [0, 1]
    means = data.train_x.mean(axis=(1, 2))
    expected = [[40 * level, 10, 200] for level in range(4)]
    np.testing.assert_allclose(means, expected, atol=4)  # JPEG is lossy


# --- Damage is named ------------------------------------------------------------------


def assert_reported(load, directory, *words):
    with pytest.raises(loaders.DataError) as error:
        load(directory)
    message = str(error.value)
    assert str(directory) in message
    for word in words:
        assert word in message, message


def test_missing_files_are_named(tmp_path):
    assert_reported(loaders.load_mnist, tmp_path, "train-images-idx3-ubyte", ".gz")
    assert_reported(
        loaders.load_cifar10, tmp_path, "cifar-10-python.tar.gz", "cifar-10-batches-bin"
    )
    assert_reported(loaders.load_cifar100, tmp_path, "cifar-100-binary.tar.gz")
    cifar = Cifar(10, binary=False)
    cifar.write(tmp_path / cifar.folder)
    (tmp_path / cifar.folder / "data_batch_1").unlink()
    assert_reported(cifar.load, tmp_path, "data_batch_1", "no such file")
    del cifar.files["test_batch"]
    shutil.rmtree(tmp_path / cifar.folder)
    cifar.write_archive(tmp_path)
    assert_reported(cifar.load, tmp_path, cifar.archive, "test_batch")


def truncate(path, keep=0.5):
    os.truncate(path, int(keep * path.stat().st_size))


@pytest.mark.parametrize("keep", [0, 0.001, 0.7])
def test_truncated_files_are_named(cifar, keep, tmp_path):
    folder = tmp_path / cifar.folder
    cifar.write(folder)
    name = next(iter(cifar.files))
    truncate(folder / name, keep)
    assert_reported(cifar.load, tmp_path, str(folder / name), "expected")
    shutil.rmtree(folder)
    cifar.write_archive(tmp_path)
    truncate(tmp_path / cifar.archive, keep)
    assert_reported(cifar.load, tmp_path, cifar.archive, "expected a gzipped tar")


@pytest.mark.parametrize("keep", [0, 0.001, 0.7])
def test_truncated_mnist_is_named(keep, tmp_path):
    write_mnist(tmp_path)
    truncate(tmp_path / "t10k-images-idx3-ubyte", keep)
    words = ("t10k-images-idx3-ubyte", "expected")
    assert_reported(loaders.load_mnist_test, tmp_path, *words)
    named = {"name": lambda part, k: f"{part}-idx{k}-ubyte.gz", "write": gzip.compress}
    for path in tmp_path.iterdir():
        path.unlink()
    write_mnist(tmp_path, **named)
    truncate(tmp_path / "t10k-labels-idx1-ubyte.gz", keep)
    assert_reported(loaders.load_mnist_test, tmp_path, "t10k-labels", "expected")


def test_files_of_another_kind_are_named(tmp_path):
    write_mnist(tmp_path)
    shutil.copy(
        tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "t10k-images-idx3-ubyte"
    )
    assert_reported(loaders.load_mnist_test, tmp_path, "00000801", "00000803")
    write_mnist(tmp_path)
    shutil.copy(
        tmp_path / "train-labels-idx1-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    )
    assert_reported(loaders.load_mnist_test, tmp_path, "5 labels, expected 3")
    labels = idx(np.array([1, 10, 2], np.uint8))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    assert_reported(loaders.load_mnist_test, tmp_path, "not integers from 0 to 9")


def test_damaged_npz_are_named(tmp_path):
    (tmp_path / "mnist_t10k.npz").write_bytes(b"no zip file")
    assert_reported(loaders.load_mnist_test, tmp_path, "mnist_t10k.npz", "image, label")
    np.savez(tmp_path / "mnist_t10k.npz", image=np.zeros((1, 28, 28), np.uint8))
    assert_reported(loaders.load_mnist_test, tmp_path, "mnist_t10k.npz", "label")
    np.savez(
        tmp_path / "mnist_t10k.npz", image=np.zeros((1, 28)), label=np.zeros(1, int)
    )
    assert_reported(loaders.load_mnist_test, tmp_path, "float64", "expected uint8")
    write_jpegs(tmp_path, damage=lambda data: data[:-300])
    assert_reported(loaders.load_cifar10, tmp_path, "cifar10_jpeg.npz", "JPEG")


def code():
    pytest.fail("code that the file names has run")


class Malice:
    def __reduce__(self):
        return code, ()


MALICE = [Malice(), np.array([Malice()]), code]


@pytest.mark.parametrize("data", MALICE, ids=["call", "in an array", "function"])
def test_pickles_that_ask_for_more_than_arrays_are_refused(data, tmp_path):
    cifar = Cifar(10, binary=False)
    cifar.files["data_batch_1"] = pickle.dumps({b"data": data, b"labels": [0]}, 2)
    cifar.write(tmp_path)
    assert_reported(cifar.load, tmp_path, "data_batch_1", "asks for test_loaders.code")


def test_pickles_of_something_else_are_named(tmp_path):
    cifar = Cifar(10, binary=False)
    cifar.files["data_batch_1"] = pickle.dumps(["no dict"], 2)
    cifar.write(tmp_path)
    assert_reported(cifar.load, tmp_path, "data_batch_1", "no dict with b'data'")
