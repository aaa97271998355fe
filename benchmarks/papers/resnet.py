"""ResNets for images of 32 × 32: a first convolution of 3 × 3, and no pooling after it.

`convolve_by_matmul` computes the convolutions where XLA's own are slow: on a CPU inside
of a loop, such as an epoch in one program or the measurement of a Hessian.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

CLASSES = 10


class ResNet(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", with basic blocks.

    The defaults are ResNet-18 with 11.2 million parameters. Weights and statistics are
    float32, whatever the dtype of the computation. `convolve` has the arguments of
    `lax.conv_general_dilated`, which is the default.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)  # in each stage
    width: int = 64  # channels of the first stage; every further one has twice as many
    dtype: Any = jnp.float32
    stem: tuple[int, int] = (3, 1)  # size and stride of the first convolution
    convolve: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        layer = functools.partial(_normalized, train=train, convolve=self.convolve)
        x = nn.relu(layer(x.astype(self.dtype), self.width, *self.stem))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                channels = self.width * 2**stage
                x = BasicBlock(channels, stride, self.convolve)(x, train)
        logits = nn.Dense(CLASSES, dtype=self.dtype)(x.mean(axis=(1, 2)))
        return logits.astype(jnp.float32)


class BasicBlock(nn.Module):
    channels: int
    stride: int
    convolve: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        layer = functools.partial(_normalized, train=train, convolve=self.convolve)
        y = nn.relu(layer(x, self.channels, 3, self.stride))
        y = layer(y, self.channels, 3, 1)
        if x.shape != y.shape:
            x = layer(x, self.channels, 1, self.stride)
        return nn.relu(x + y)


def convolve_by_matmul(
    x: jax.Array, kernel: jax.Array, strides, padding, **_: Any
) -> jax.Array:
    """A convolution as one product of matrices: of all patches, and of the kernel.

    Like `lax.conv_general_dilated` for images of (n, height, width, channels) and a
    kernel of (height, width, channels, channels), without dilation or groups.
    """
    height, width, _, channels = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def places(start: int, size: int, length: int, stride: int) -> slice:
        last = start + (length - size) // stride * stride
        return slice(start, last + 1, stride)

    rows = [places(i, height, x.shape[1], strides[0]) for i in range(height)]
    columns = [places(j, width, x.shape[2], strides[1]) for j in range(width)]
    parts = [x[:, row, column] for row in rows for column in columns]
    patches = jnp.concatenate(parts, axis=-1)
    return patches @ kernel.reshape(-1, channels)


def _normalized(x, channels: int, size: int, stride: int, train: bool, convolve):
    """A convolution, and batch normalisation, in the dtype of x."""
    padding = size // 2  # on both sides, which "SAME" is not with a stride
    options = {"strides": stride, "padding": padding, "use_bias": False}
    options |= {"conv_general_dilated": convolve} if convolve else {}
    options["kernel_init"] = nn.initializers.variance_scaling(2, "fan_out", "normal")
    x = nn.Conv(channels, (size, size), dtype=x.dtype, **options)(x)
    return nn.BatchNorm(not train, momentum=0.9, dtype=x.dtype)(x)
