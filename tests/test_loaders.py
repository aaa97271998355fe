"""The loaders read what the data sets are distributed as, and name damaged files."""

import collections
import gzip
import io
import itertools
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

import loaders

RNG = np.random.default_rng(0)


def integers(high, *shape):
    return RNG.integers(0, high, shape, dtype=np.uint8)


# --- Files as they are distributed ----------------------------------------------------


# The loader of a data set, its files as name -> bytes, and what is in them.
Format = collections.namedtuple("Format", ["load", "files", "arrays"])


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def npz(**arrays):
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


def mnist(name="{}-idx{}-ubyte", pack=bytes):
    shapes = {"train-images": (5, 28, 28), "train-labels": (5,)}
    shapes |= {"t10k-images": (3, 28, 28), "t10k-labels": (3,)}
    arrays = [integers(256 if len(s) > 1 else 10, *s) for s in shapes.values()]
    names = (name.format(part, len(shape)) for part, shape in shapes.items())
    files = dict(zip(names, (pack(idx(array)) for array in arrays), strict=True))
    return Format(loaders.load_mnist, files, arrays)


def rows(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python(images, labels, classes):
    content = {b"data": rows(images), b"filenames": [b"a.png"], b"batch_label": b"one"}
    content[b"labels" if classes == 10 else b"fine_labels"] = labels.tolist()
    # As NumPy 1 named its module, in files of Python 2.
    return pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core")


def binary(images, labels, classes):
    coarse = [labels[:, None] % 20] if classes == 100 else []
    return np.concatenate([*coarse, labels[:, None], rows(images)], axis=1).tobytes()


def tar(files):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def cifar(folder, encode, place):
    classes, ten = int(folder.split("-")[1]), folder.startswith("cifar-10-")
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    names = names if ten else ["train", "test"]
    images = integers(256, len(names), 2, 32, 32, 3)
    labels = integers(classes, len(names), 2)
    prefix = "" if place == "inside" else f"{folder}/"
    suffix = ".bin" if encode is binary else ""
    parts = zip(names, images, labels, strict=True)
    files = {f"{prefix}{k}{suffix}": encode(x, y, classes) for k, x, y in parts}
    if place == "archive":
        files = {f"cifar-{classes}-{encode.__name__}.tar.gz": tar(files)}
    train = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    load = loaders.load_cifar10 if ten else loaders.load_cifar100
    return Format(load, files, [*train, images[-1], labels[-1]])


def jpegs(cut=None):
    arrays, expected = {}, []
    for part, n in (("train", 4), ("test", 2)):
        files = []
        for level in range(n):
            image = Image.new("RGB", (32, 32), (40 * level, 10, 200))
            image.save(file := io.BytesIO(), "JPEG")
            files.append(file.getvalue())
        colours = np.array([[40 * level, 10, 200] for level in range(n)])
        expected += [np.tile(colours[:, None, None], (1, 32, 32, 1)), np.arange(n)]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files)[:cut], np.uint8)
        arrays[f"{part}_offset"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_label"] = np.arange(n, dtype=np.uint8)
    return Format(loaders.load_cifar10, {"cifar10_jpeg.npz": npz(**arrays)}, expected)


TEST = [integers(256, 4, 28, 28), np.array([3, 1, 4, 1], np.uint8)]
NPZ = {"mnist_t10k.npz": npz(image=TEST[0], label=TEST[1])}
FORMATS = {
    "mnist": mnist(),
    "mnist, dots": mnist("{}.idx{}-ubyte"),
    "mnist, gzipped": mnist("{}-idx{}-ubyte.gz", gzip.compress),
    "mnist, npz": Format(loaders.load_mnist_test, NPZ, TEST),
    "jpegs": jpegs(),
}
VERSIONS = {"cifar-10-batches-py": python, "cifar-10-batches-bin": binary}
VERSIONS |= {"cifar-100-python": python, "cifar-100-binary": binary}
for (folder, encode), place in itertools.product(
    VERSIONS.items(), ("folder", "inside", "archive")
):
    FORMATS[f"{folder}, {place}"] = cifar(folder, encode, place)


def write(files, directory):
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read(name, tmp_path):
    load, files, arrays = FORMATS[name]
    write(files, tmp_path)
    found = load(str(tmp_path))
    assert [array.dtype for array in found] == [np.uint8, np.int32] * (len(arrays) // 2)
    for array, expected in zip(found, arrays, strict=True):
        lossy = 4 if name == "jpegs" and array.ndim > 1 else 0
        np.testing.assert_allclose(array, expected, rtol=0, atol=lossy)


# --- Damage is named ------------------------------------------------------------------


def assert_named(load, directory, *words):
    with pytest.raises(loaders.DataError) as error:
        load(directory)
    for word in (str(directory), *words):
        assert word in str(error.value)


@pytest.mark.parametrize("keep", [0, 0.001, 0.7])
@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files_are_named(name, keep, tmp_path):
    load, files, _ = FORMATS[name]
    first, data = next(iter(files.items()))
    write(files | {first: data[: int(keep * len(data))]}, tmp_path)
    form = "expected a gzipped tar" if first.endswith("tar.gz") else "expected"
    assert_named(load, tmp_path, first, form)


def code():
    pytest.fail("code that the file names has run")


class Malice:
    def __reduce__(self):
        return code, ()


def pickled(data):
    return {"data_batch_1": pickle.dumps(data, 2)}


PY = "cifar-10-batches-py"
FOLDER, INSIDE, ARCHIVE = (
    f"{PY}, {place}" for place in ("folder", "inside", "archive")
)
NO_TEST = {k: v for k, v in FORMATS[FOLDER].files.items() if "test" not in k}
IMAGES, LABELS, ONE = (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
    "mnist_t10k.npz",
)
FLOATS = npz(image=np.zeros((1, 28, 28)), label=TEST[1][:1])
ASKS = ("data_batch_1", "asks for test_loaders.code")
BAD = [  # a format, what replaces its files (None: it is not there), what is said of it
    ("mnist", None, ("train-images-idx3-ubyte: no such file", ".gz")),
    (FOLDER, None, ("cifar-10-python.tar.gz", "cifar-10-batches-bin")),
    ("cifar-100-python, folder", None, ("cifar-100-binary.tar.gz",)),
    (FOLDER, {f"{PY}/data_batch_1": None}, ("data_batch_1: no such file",)),
    (
        ARCHIVE,
        {"cifar-10-python.tar.gz": tar(NO_TEST)},
        ("python.tar.gz", "test_batch"),
    ),
    ("mnist", {IMAGES: idx(TEST[1])}, ("00000801", "00000803")),
    ("mnist", {LABELS: idx(integers(10, 5))}, (LABELS, "5 labels, expected 3")),
    ("mnist", {LABELS: idx(np.array([1, 10, 2], np.uint8))}, ("from 0 to 9",)),
    ("mnist, npz", {ONE: b"no zip file"}, (ONE, "image, label")),
    ("mnist, npz", {ONE: npz(image=TEST[0])}, (ONE, "label")),
    ("mnist, npz", {ONE: FLOATS}, ("float64", "expected uint8")),
    ("jpegs", jpegs(-300).files, ("cifar10_jpeg.npz", "JPEG")),
    (INSIDE, pickled({b"data": Malice(), b"labels": [0]}), ASKS),
    (INSIDE, pickled({b"data": np.array([Malice()]), b"labels": [0]}), ASKS),
    (INSIDE, pickled({b"data": code, b"labels": [0]}), ASKS),
    (INSIDE, pickled(["no dict"]), ("data_batch_1", "no dict with b'data'")),
]


@pytest.mark.parametrize("name, changes, words", BAD)
def test_bad_files_are_named(name, changes, words, tmp_path):
    load, files, _ = FORMATS[name]
    files = {} if changes is None else files | changes
    write({k: data for k, data in files.items() if data is not None}, tmp_path)
    assert_named(load, tmp_path, *words)
