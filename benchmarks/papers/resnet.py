"""ResNets for images of 32 × 32: a stem of 3 × 3, and no pooling after it."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

CLASSES = 10


class ResNet(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", with basic blocks.

    The defaults are ResNet-18 with 11.2 million parameters. Weights and statistics are
    float32, whatever the dtype of the computation.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)  # in each stage
    width: int = 64  # channels of the first stage; every further one has twice as many
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(_normalized(x.astype(self.dtype), self.width, 3, 1, train))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                x = BasicBlock(self.width * 2**stage, stride)(x, train)
        logits = nn.Dense(CLASSES, dtype=self.dtype)(x.mean(axis=(1, 2)))
        return logits.astype(jnp.float32)


class BasicBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        layer = functools.partial(_normalized, channels=self.channels, train=train)
        y = nn.relu(layer(x, size=3, stride=self.stride))
        y = layer(y, size=3, stride=1)
        if x.shape != y.shape:
            x = layer(x, size=1, stride=self.stride)
        return nn.relu(x + y)


def _normalized(x, channels: int, size: int, stride: int, train: bool):
    """A convolution, and batch normalisation, in the dtype of x."""
    padding = size // 2  # on both sides, which "SAME" is not with a stride
    options = {"strides": stride, "padding": padding, "use_bias": False}
    options["kernel_init"] = nn.initializers.variance_scaling(2, "fan_out", "normal")
    x = nn.Conv(channels, (size, size), dtype=x.dtype, **options)(x)
    return nn.BatchNorm(not train, momentum=0.9, dtype=x.dtype)(x)
