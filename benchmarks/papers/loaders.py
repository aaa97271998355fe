"""Loaders of MNIST, CIFAR-10 and CIFAR-100, in the formats they are distributed in.

Each reads from a directory of the user's. Nothing is downloaded.
"""

import contextlib
import gzip
import io
import itertools
import math
import pathlib
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from sklearn import datasets


class DataError(Exception):
    """A file that is missing or not what it should be; the message names it."""


class Dataset(NamedTuple):
    """Images and labels, as they are stored.

    Attributes:
      train_x: uint8, (n, height, width) or (n, height, width, 3).
      train_y: int32, (n,).
      test_x: as train_x.
      test_y: as train_y.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_mnist(directory: pathlib.Path | str) -> Dataset:
    """MNIST, or what has its format, from four idx files, gzipped or not."""
    return Dataset(*_mnist_part(directory, "train"), *load_mnist_test(directory))


def load_mnist_test(directory: pathlib.Path | str) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's test images and labels: idx files, or `mnist_t10k.npz` (image, label)."""
    path = pathlib.Path(directory) / "mnist_t10k.npz"
    if not path.exists():
        return _mnist_part(directory, "t10k")
    arrays = _read_npz(path, ("image", "label"))
    return _checked(path, arrays["image"], arrays["label"], (28, 28), 10)


def load_cifar10(directory: pathlib.Path | str) -> Dataset:
    """CIFAR-10, of the Python or binary version, as the archive or unpacked.

    Or from `cifar10_jpeg.npz`: for train and test, one array of JPEG files end to end
    (`train_jpeg`), where each begins (`train_offset`), and `train_label`.
    """
    path = pathlib.Path(directory) / "cifar10_jpeg.npz"
    if path.exists():
        return _read_jpegs(path)
    parts = [f"data_batch_{i}" for i in range(1, 6)]
    return _load_cifar(
        directory,
        _Version(
            "cifar-10-batches-py", "cifar-10-python", "", _parse_pickle(b"labels")
        ),
        _Version("cifar-10-batches-bin", "cifar-10-binary", ".bin", _parse_binary(1)),
        (parts, ["test_batch"]),
        classes=10,
    )


def load_cifar100(directory: pathlib.Path | str) -> Dataset:
    """CIFAR-100 with its 100 fine labels, in the same versions as CIFAR-10."""
    fine = _parse_pickle(b"fine_labels")
    return _load_cifar(
        directory,
        _Version("cifar-100-python", "cifar-100-python", "", fine),
        _Version("cifar-100-binary", "cifar-100-binary", ".bin", _parse_binary(2)),
        (["train"], ["test"]),
        classes=100,
    )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images, 8 × 8 and from 0 to 16, that come with scikit-learn."""
    digits: Any = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int32)


def split(
    images: np.ndarray, labels: np.ndarray, sizes: Sequence[int], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of these sizes, divided by the seed, and last the rest, for the test.

    The test images are the same for every seed. Images become rows, from 0 to 1.
    """
    x = images.reshape(len(images), -1).astype(np.float32) / images.max()
    # Shuffled first, since MNIST's test set begins with its easier half.
    order = np.random.default_rng(0).permutation(len(x))
    rest, test = np.split(order, [sum(sizes)])
    shuffled = np.random.default_rng(seed).permutation(rest)
    parts = np.split(shuffled, np.cumsum(sizes)[:-1])
    return [(x[part], labels[part]) for part in (*parts, test)]


# --- MNIST ----------------------------------------------------------------------------


def _mnist_part(directory, part):
    images, image_path = _read_idx(directory, f"{part}-images", 3)
    labels, label_path = _read_idx(directory, f"{part}-labels", 1)
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: {len(labels)} labels, expected {len(images)}, one for each "
            f"image in {image_path}"
        )
    return _checked(label_path, images, labels, images.shape[1:], 10)


def _read_idx(directory, stem, dimensions):
    """The array of an idx file, and its path.

    The header is two zero bytes, the type (8 is uint8), the number of dimensions, and
    each of these as a big-endian integer of 4 bytes.
    """
    name = f"{stem}-idx{dimensions}-ubyte"
    path = _find(directory, (name, name + ".gz", name.replace("-idx", ".idx")))
    with _damage_reported(path, f"an idx file of {dimensions} dimensions"):
        read = gzip.decompress if path.suffix == ".gz" else bytes
        data = read(path.read_bytes())
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise DataError(
            f"{path}: begins with {data[:4].hex()}, expected 000008{dimensions:02x} "
            f"and {dimensions} sizes, the header of an idx file of bytes"
        )
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    expected = start + math.prod(shape)
    if len(data) != expected:
        raise DataError(
            f"{path}: {len(data)} bytes, expected {expected} for the shape {shape} in "
            "its header"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape), path


# --- CIFAR ----------------------------------------------------------------------------

IMAGE_BYTES = 3 * 32 * 32  # the red, the green and the blue plane, row by row


class _Version(NamedTuple):
    folder: str
    archive: str  # without .tar.gz
    suffix: str  # of the files inside
    parse: Callable[[bytes], tuple[np.ndarray, np.ndarray]]


def _load_cifar(directory, python, binary, parts, classes):
    directory = pathlib.Path(directory)
    places = [
        (version, place)
        for version in (python, binary)
        for place in (
            directory / version.folder,
            directory / f"{version.archive}.tar.gz",
            directory,
        )
    ]
    names = [part for group in parts for part in group]
    for version, place in places:
        inside = any((place / f"{name}{version.suffix}").exists() for name in names)
        if inside if place == directory else place.exists():
            break
    else:
        wanted = ", ".join(str(place.name) for _, place in places if place != directory)
        raise DataError(
            f"{directory}: no data, expected one of {wanted}, or what is inside of one"
        )
    files = _read_files(version, place, names)
    arrays = []
    for group in parts:
        read = []
        for part in group:
            name, content = files[part]
            read.append(_parse_file(version, name, content, classes))
        arrays += [np.concatenate(pair) for pair in zip(*read, strict=True)]
    return Dataset(*arrays)


def _read_files(version, place, parts):
    """Part -> (what to call the file in errors, its bytes)."""
    if place.suffix != ".gz":
        paths = {part: place / f"{part}{version.suffix}" for part in parts}
        for path in paths.values():
            if not path.exists():
                raise DataError(f"{path}: no such file, expected beside the others")
        return {part: (path, path.read_bytes()) for part, path in paths.items()}
    files = {}
    with _damage_reported(place, "a gzipped tar archive"), tarfile.open(place) as tar:
        for part in parts:
            name = f"{version.folder}/{part}{version.suffix}"
            member = tar.extractfile(name)  # KeyError where there is none
            if member is None:
                raise ValueError(f"{name} is not a file")
            files[part] = f"{place}, {name}", member.read()
    return files


def _parse_file(version, name, data, classes):
    with _damage_reported(name, "images and labels of CIFAR"):
        images, labels = version.parse(data)
    images, labels = _checked(name, images, labels, (IMAGE_BYTES,), classes)
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _parse_pickle(label_key):
    def parse(data):
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(content, Mapping) or not {b"data", label_key} <= set(content):
            raise ValueError(f"no dict with {b'data'!r} and {label_key!r}")
        return content[b"data"], np.asarray(content[label_key])

    return parse


def _parse_binary(labels):
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
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}") from None


def _read_jpegs(path):
    arrays = _read_npz(
        path,
        [
            f"{part}_{k}"
            for part in ("train", "test")
            for k in ("jpeg", "offset", "label")
        ],
    )
    parts = []
    for part in ("train", "test"):
        jpeg, offset, label = (
            arrays[f"{part}_{k}"] for k in ("jpeg", "offset", "label")
        )
        with _damage_reported(path, f"JPEG files at the places in {part}_offset"):
            bounds = itertools.pairwise(offset)
            images = np.stack([_decode(jpeg[start:end]) for start, end in bounds])
        parts += _checked(path, images, label, (32, 32, 3), 10)
    return Dataset(*parts)


def _decode(jpeg):
    from PIL import Image  # comes with Matplotlib, which loading alone does not need

    return np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB"))


# --- What all have in common ----------------------------------------------------------


def _find(directory, names):
    paths = [pathlib.Path(directory) / name for name in names]
    for path in paths:
        if path.exists():
            return path
    raise DataError(
        f"{paths[0]}: no such file, nor {' or '.join(path.name for path in paths[1:])}"
    )


def _read_npz(path, keys):
    with (
        _damage_reported(path, f"an npz file with {', '.join(keys)}"),
        np.load(path, allow_pickle=False) as arrays,
    ):
        return {key: arrays[key] for key in keys}


def _checked(name, images: Any, labels: Any, shape, classes):
    """(images, int32 labels), or a DataError if they are not what they should be."""
    if getattr(images, "dtype", None) != np.uint8 or images.shape[1:] != shape:
        got = f"{getattr(images, 'dtype', type(images))} {getattr(images, 'shape', '')}"
        raise DataError(f"{name}: images of {got}, expected uint8 of (n, *{shape})")
    if len(images) == 0:
        raise DataError(f"{name}: no images, expected some")
    if labels.shape != (len(images),):
        raise DataError(
            f"{name}: labels of shape {labels.shape}, expected one for each of the "
            f"{len(images)} images"
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
