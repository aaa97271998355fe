"""MNIST, CIFAR-10 and CIFAR-100, in the formats they are distributed in; and a text.

Each is read from a directory of the user's, or comes with an installed package. Nothing
is downloaded.
"""

import contextlib
import gzip
import io
import itertools
import pathlib
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pydoc_data import topics
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from sklearn import datasets


class DataError(Exception):
    """A file that is missing or not what it should be; the message names it."""


class Dataset(NamedTuple):
    """Images and labels, as they are stored."""

    train_x: np.ndarray  # uint8, (n, height, width) or (n, height, width, 3)
    train_y: np.ndarray  # int32, (n,)
    test_x: np.ndarray
    test_y: np.ndarray


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images, 8 × 8 and from 0 to 16, that come with scikit-learn."""
    digits: Any = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int32)


def load_text() -> str:
    """Some 465,000 characters of English: the topics of `help()` of this Python."""
    return "\n".join(text for _, text in sorted(topics.topics.items()))


def cut_text(
    text: str, length: int, sizes: Sequence[int], seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Parts of windows of a text, divided as in `split`, and the size of the alphabet.

    A window is (characters, the characters that follow each), as integers. Windows do
    not overlap.
    """
    alphabet, codes = np.unique(list(text), return_inverse=True)
    count = (len(codes) - 1) // length
    x = codes[: count * length].reshape(count, length).astype(np.int32)
    y = codes[1 : count * length + 1].reshape(count, length).astype(np.int32)
    return _divide(x, y, sizes, seed), len(alphabet)


def split(
    images: np.ndarray, labels: np.ndarray, sizes: Sequence[int], seed: int, noise=0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of these sizes, divided by the seed, and last the rest, for the test.

    The test images are the same for every seed. Images become rows, from 0 to 1. In the
    first part, `noise` % of the labels are random, so that one in ten of them is right.
    """
    x = images.reshape(len(images), -1).astype(np.float32) / images.max()
    parts = _divide(x, labels, sizes, seed)
    replaced = round(sizes[0] * noise / 100)
    parts[0][1][:replaced] = np.random.default_rng(seed).integers(0, 10, replaced)
    return parts


def _divide(x, y, sizes, seed):
    # Shuffled first, since MNIST's test set begins with its easier half.
    order = np.random.default_rng(0).permutation(len(x))
    rest, test = np.split(order, [sum(sizes)])
    shuffled = np.random.default_rng(seed).permutation(rest)
    places = np.split(shuffled, np.cumsum(sizes)[:-1])
    return [(x[place], y[place]) for place in (*places, test)]


# --- MNIST ----------------------------------------------------------------------------


def load_mnist(directory: pathlib.Path | str) -> Dataset:
    """MNIST, or what has its format, from four idx files, gzipped or not."""
    return Dataset(*_mnist_part(directory, "train"), *load_mnist_test(directory))


def load_mnist_test(directory: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's test images and labels: idx files, or `mnist_t10k.npz` (image, label)."""
    path = pathlib.Path(directory) / "mnist_t10k.npz"
    if not path.exists():
        return _mnist_part(directory, "t10k")
    return _checked(path, *_read_npz(path, ("image", "label")), (28, 28), 10)


def _mnist_part(directory, part):
    images, _ = _read_idx(directory, f"{part}-images", 3)
    labels, path = _read_idx(directory, f"{part}-labels", 1)
    return _checked(path, images, labels, images.shape[1:], 10)


def _read_idx(directory, stem, dimensions):
    """The array of an idx file, and its path.

    The header is two zero bytes, the type (8 is uint8), the number of dimensions, and
    each of these as a big-endian integer of 4 bytes.
    """
    name = f"{stem}-idx{dimensions}-ubyte"
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
    paths = [pathlib.Path(directory) / name for name in names]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise DataError(f"{paths[0]}: no such file, nor {' or '.join(names[1:])}")
    magic = bytes([0, 0, 8, dimensions])
    form = f"{magic.hex()}, {dimensions} sizes, and as many bytes, as in an idx file"
    with _damage_reported(path, form):
        read = gzip.decompress if path.suffix == ".gz" else bytes
        data = read(path.read_bytes())
        if not data.startswith(magic):
            raise ValueError(f"begins with {data[:4].hex()}")
        shape = np.frombuffer(data, ">u4", dimensions, 4).astype(int)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        return values.reshape(shape), path


# --- CIFAR ----------------------------------------------------------------------------

IMAGE_BYTES = 3 * 32 * 32  # the red, the green and the blue plane, row by row


def load_cifar10(directory: pathlib.Path | str) -> Dataset:
    """CIFAR-10, of the Python or binary version, as the archive or unpacked.

    Or from `cifar10_jpeg.npz`: for train and test, one array of JPEG files end to end
    (`train_jpeg`), where each begins (`train_offset`), and `train_label`.
    """
    path = pathlib.Path(directory) / "cifar10_jpeg.npz"
    return _read_jpegs(path) if path.exists() else _load_cifar(directory, 10)


def load_cifar100(directory: pathlib.Path | str) -> Dataset:
    """CIFAR-100 with its 100 fine labels, in the same versions as CIFAR-10."""
    return _load_cifar(directory, 100)


def _pickled(label_key):
    def parse(data):
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, Mapping) or not {b"data", label_key} <= set(content):
            raise ValueError(f"no dict with {b'data'!r} and {label_key!r}")
        return content[b"data"], np.asarray(content[label_key])

    return parse


def _records(labels):
    """Records of `labels` bytes, of which the last one counts, and of an image."""

    def parse(data):
        size = labels + IMAGE_BYTES
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes, which {size} does not divide")
        records = np.frombuffer(data, np.uint8).reshape(-1, size)
        return records[:, labels:], records[:, labels - 1]

    return parse


class _Unpickler(pickle.Unpickler):
    """Makes arrays of NumPy and plain containers only: a pickle can run any code."""

    _reconstruct, (_array, *_), *_ = np.zeros(0).__reduce__()
    _allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # How Python 3 writes bytes for Python 2.
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return self._allowed[module, name]


class _Version(NamedTuple):
    """A version of CIFAR, as it is distributed."""

    folder: str
    archive: str  # without .tar.gz; it holds the folder
    suffix: str  # of the files inside
    parse: Callable[[bytes], tuple[Any, np.ndarray]]  # -> rows of bytes, labels


# By the number of classes. The last file is the test's.
FILES = {
    10: [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    100: ["train", "test"],
}
VERSIONS = {
    10: [
        _Version("cifar-10-batches-py", "cifar-10-python", "", _pickled(b"labels")),
        _Version("cifar-10-batches-bin", "cifar-10-binary", ".bin", _records(1)),
    ],
    100: [
        _Version("cifar-100-python", "cifar-100-python", "", _pickled(b"fine_labels")),
        _Version("cifar-100-binary", "cifar-100-binary", ".bin", _records(2)),
    ],
}


def _load_cifar(directory, classes):
    directory = pathlib.Path(directory)
    for version in VERSIONS[classes]:
        names = [f"{name}{version.suffix}" for name in FILES[classes]]
        places = [directory / version.folder, directory / f"{version.archive}.tar.gz"]
        if any((directory / name).exists() for name in names):
            places.append(directory)
        place = next((place for place in places if place.exists()), None)
        if place:
            files = _read_files(place, version.folder, names)
            *train, test = [_parse_file(version, *file, classes) for file in files]
            return Dataset(*map(np.concatenate, zip(*train, strict=True)), *test)
    wanted = ", ".join(f"{v.folder}, {v.archive}.tar.gz" for v in VERSIONS[classes])
    raise DataError(
        f"{directory}: no data, expected one of {wanted}, or what is inside of one"
    )


def _read_files(place, folder, names):
    """Of each file, what to call it in messages, and its bytes."""
    if place.suffix != ".gz":
        for name in names:
            if not (place / name).exists():
                raise DataError(f"{place / name}: no such file, expected like others")
        return [(place / name, (place / name).read_bytes()) for name in names]
    with _damage_reported(place, "a gzipped tar archive"), tarfile.open(place) as tar:
        members = [f"{folder}/{name}" for name in names]
        return [(f"{place}, {m}", tar.extractfile(m).read()) for m in members]


def _parse_file(version, name, data, classes):
    with _damage_reported(name, "images and labels of CIFAR"):
        images, labels = version.parse(data)
    images, labels = _checked(name, images, labels, (IMAGE_BYTES,), classes)
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _read_jpegs(path):
    arrays = []
    for part in ("train", "test"):
        keys = (f"{part}_{key}" for key in ("jpeg", "offset", "label"))
        jpeg, offset, label = _read_npz(path, tuple(keys))
        with _damage_reported(path, f"JPEG files at the places in {part}_offset"):
            files = (io.BytesIO(jpeg[a:b]) for a, b in itertools.pairwise(offset))
            images = np.stack([Image.open(file).convert("RGB") for file in files])
        arrays += _checked(path, images, label, (32, 32, 3), 10)
    return Dataset(*arrays)


# --- What all have in common ----------------------------------------------------------


def _read_npz(path, keys):
    with (
        _damage_reported(path, f"an npz file with {', '.join(keys)}"),
        np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays,
    ):
        return [arrays[key] for key in keys]


def _checked(name, images: Any, labels, shape, classes):
    """(images, int32 labels), or a DataError if they are not what they should be."""
    dtype, found = getattr(images, "dtype", type(images)), np.shape(images)
    if dtype != np.uint8 or found[1:] != shape:
        raise DataError(
            f"{name}: images of {dtype} {found}, expected uint8 of (n, *{shape})"
        )
    if len(images) == 0:
        raise DataError(f"{name}: no images, expected some")
    if labels.shape != (len(images),):
        raise DataError(
            f"{name}: {labels.size} labels, expected {len(images)}, one for each image"
        )
    if labels.dtype.kind not in "iu" or not np.all((labels >= 0) & (labels < classes)):
        raise DataError(f"{name}: labels are not integers from 0 to {classes - 1}")
    return images, labels.astype(np.int32)


@contextlib.contextmanager
def _damage_reported(name, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # parsers of damaged files raise anything
        raise DataError(f"{name}: {error}; expected {expected}") from error
