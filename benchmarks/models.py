"""The models whose steps are timed: plain functions of a dict of parameters.

Images come as (batch, height, width, channels), labels as integers.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

CLASSES = 10


class Model(NamedTuple):
    """A model, with the sizes that it has by default.

    Attributes:
      init: `init(key, width)` returns the parameters.
      predict: `predict(params, images)` returns the logits.
      image: the shape of an image, (height, width, channels).
      width: the width of the layers. For large widths, the number of parameters grows
        with its square.
      batch: the number of examples in a batch.
    """

    init: Callable[[jax.Array, int], Any]
    predict: Callable[[Any, jax.Array], jax.Array]
    image: tuple[int, int, int]
    width: int
    batch: int


def make_loss(predict: Callable[..., jax.Array], dtype: Any) -> Callable[..., Any]:
    """Cross-entropy of logits that are computed in `dtype` from float32 parameters."""

    def loss_fn(params, x, y):
        params, x = optax.tree.cast((params, x), dtype)
        logits = predict(params, x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn


def make_batch(model: Model, batch: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (batch, *model.image))
    return x, jax.random.randint(keys[1], (batch,), 0, CLASSES)


def _keys(key: jax.Array) -> Iterator[jax.Array]:
    return (jax.random.fold_in(key, index) for index in itertools.count())


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    fan_in = max(1, jnp.zeros(shape[:-1]).size)
    return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


# --- A multilayer perceptron: much of a step goes to passes over the parameters.


def mlp(image: tuple[int, int, int], width: int, batch: int) -> Model:
    inputs = image[0] * image[1] * image[2]

    def init(key, width):
        keys, sizes = _keys(key), [inputs, width, width, CLASSES]
        return {
            f"layer{index}": {"w": _normal(next(keys), a, b), "b": jnp.zeros(b)}
            for index, (a, b) in enumerate(itertools.pairwise(sizes))
        }

    def predict(params, x):
        x = x.reshape(len(x), -1)
        for index in range(len(params)):
            layer = params[f"layer{index}"]
            x = (jax.nn.relu(x) if index else x) @ layer["w"] + layer["b"]
        return x

    return Model(init, predict, image, width, batch)


# --- A residual network: most of a step goes to convolutions.


def resnet(
    image: tuple[int, int, int], width: int, batch: int, blocks: tuple[int, ...]
) -> Model:
    """Basic blocks in stages. Each stage doubles the channels and halves the images.

    Each channel of each example is normalised on its own, so there are no batch
    statistics.
    """

    def init(key, width):
        keys = _keys(key)

        def convolution(size, channels, outputs):
            return {
                "w": _normal(next(keys), size, size, channels, outputs),
                "scale": jnp.ones(outputs),
                "bias": jnp.zeros(outputs),
            }

        params: dict[str, Any] = {"stem": convolution(3, image[2], width)}
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                outputs = width * 2**stage
                params[f"stage{stage}_{block}"] = {
                    "first": convolution(3, channels, outputs),
                    "second": convolution(3, outputs, outputs),
                }
                if channels != outputs:
                    params[f"stage{stage}_{block}"]["skip"] = convolution(
                        1, channels, outputs
                    )
                channels = outputs
        params["out"] = _normal(next(keys), channels, CLASSES)
        return params

    def convolve(params, x, stride=1):
        x = jax.lax.conv_general_dilated(
            x,
            params["w"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.standardize(x, axis=(1, 2))
        return x * params["scale"] + params["bias"]

    def predict(params, x):
        # The stem shrinks large images by 4, as in ResNets for ImageNet.
        x = jax.nn.relu(convolve(params["stem"], x, 4 if image[0] > 64 else 1))
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers = params[f"stage{stage}_{block}"]
                stride = 2 if stage and not block else 1
                y = jax.nn.relu(convolve(layers["first"], x, stride))
                y = convolve(layers["second"], y)
                skip = convolve(layers["skip"], x, stride) if "skip" in layers else x
                x = jax.nn.relu(skip + y)
        return x.mean(axis=(1, 2)) @ params["out"]

    return Model(init, predict, image, width, batch)


# --- A vision transformer: its parameters are many small arrays.


def transformer(
    image: tuple[int, int, int], width: int, batch: int, patch: int, depth: int
) -> Model:
    """Pre-norm blocks on patches of the image; width // 64 heads, but at least one."""
    rows, columns = image[0] // patch, image[1] // patch

    def init(key, width):
        keys = _keys(key)

        def dense(inputs, outputs):
            return {"w": _normal(next(keys), inputs, outputs), "b": jnp.zeros(outputs)}

        def norm():
            return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

        params: dict[str, Any] = {
            "patches": dense(patch * patch * image[2], width),
            "positions": _normal(next(keys), rows * columns, width),
            "norm": norm(),
            "out": dense(width, CLASSES),
        }
        for index in range(depth):
            params[f"block{index}"] = {
                "norm1": norm(),
                "qkv": dense(width, 3 * width),
                "project": dense(width, width),
                "norm2": norm(),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
        return params

    def dense(params, x):
        return x @ params["w"] + params["b"]

    def norm(params, x):
        return jax.nn.standardize(x) * params["scale"] + params["bias"]

    def attend(params, x):
        heads = max(1, x.shape[-1] // 64)
        q, k, v = jnp.split(dense(params["qkv"], x), 3, axis=-1)
        split = (*x.shape[:-1], heads, x.shape[-1] // heads)
        y = jax.nn.dot_product_attention(
            q.reshape(split), k.reshape(split), v.reshape(split)
        )
        return dense(params["project"], y.reshape(x.shape))

    def predict(params, x):
        x = x.reshape(len(x), rows, patch, columns, patch, image[2])
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), rows * columns, -1)
        x = dense(params["patches"], x) + params["positions"]
        for index in range(depth):
            block = params[f"block{index}"]
            x = x + attend(block, norm(block["norm1"], x))
            hidden = jax.nn.gelu(dense(block["up"], norm(block["norm2"], x)))
            x = x + dense(block["down"], hidden)
        return dense(params["out"], norm(params["norm"], x).mean(axis=1))

    return Model(init, predict, image, width, batch)


CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)

MODELS = {
    "mlp": mlp((16, 16, 1), width=1024, batch=32),
    "resnet": resnet(CIFAR, width=16, batch=16, blocks=(1, 1, 1)),
    "transformer": transformer(CIFAR, width=64, batch=16, patch=4, depth=2),
    "resnet18": resnet(CIFAR, width=64, batch=128, blocks=(2, 2, 2, 2)),
    "resnet18-imagenet": resnet(IMAGENET, width=64, batch=64, blocks=(2, 2, 2, 2)),
    "vit-s": transformer(CIFAR, width=384, batch=128, patch=4, depth=12),
    "vit-s-imagenet": transformer(IMAGENET, width=384, batch=64, patch=16, depth=12),
}
