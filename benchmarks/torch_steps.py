"""Two models of the benchmark in PyTorch, with a step of plain SGD and one of SAM.

The parameters are copied from JAX, so both frameworks start from the same numbers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def make_calls(
    name: str,
    params: Any,
    batch: Sequence[jax.Array],
    *,
    rho: float,
    learning_rate: float,
) -> dict[str, Callable[[], float]]:
    """Functions by the name of a step; each call takes one step and returns the loss.

    Raises:
      SystemExit: if PyTorch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit(
            "--torch compares with PyTorch, which is not installed: pip install torch"
        ) from None
    predict = {"mlp": _perceptron, "resnet": _residual}[name]
    x, y = (torch.from_numpy(np.array(part)) for part in batch)

    def make_weights():
        tree = jax.tree.map(lambda w: torch.from_numpy(np.array(w)), params)
        leaves, structure = jax.tree.flatten(tree)
        for leaf in leaves:
            leaf.requires_grad_()
        return leaves, structure

    def backward(optimizer, leaves, structure):
        optimizer.zero_grad()
        logits = predict(jax.tree.unflatten(structure, leaves), x)
        loss = torch.nn.functional.cross_entropy(logits, y.long())
        loss.backward()
        return loss.item()

    def plain(optimizer, leaves, structure):
        loss = backward(optimizer, leaves, structure)
        optimizer.step()
        return loss

    def sam(optimizer, leaves, structure):
        loss = backward(optimizer, leaves, structure)
        with torch.no_grad():
            kept = [w.clone() for w in leaves]
            norm = torch.stack([w.grad.norm() for w in leaves]).norm()
            for w in leaves:
                w.add_(w.grad * (rho / norm))
        backward(optimizer, leaves, structure)
        with torch.no_grad():
            for w, before in zip(leaves, kept, strict=True):
                w.copy_(before)
        optimizer.step()
        return loss

    calls = {}
    for label, step in (("PyTorch, plain", plain), ("PyTorch, SAM", sam)):
        leaves, structure = make_weights()
        optimizer = torch.optim.SGD(leaves, lr=learning_rate)
        calls[label] = functools.partial(step, optimizer, leaves, structure)
    return calls


def _perceptron(params: Any, x: Any) -> Any:
    x = x.flatten(1)
    for index in range(len(params)):
        layer = params[f"layer{index}"]
        x = (x.relu() if index else x) @ layer["w"] + layer["b"]
    return x


def _residual(params: Any, x: Any) -> Any:
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    def convolve(layer, x, stride=1):
        size = len(layer["w"])
        if stride > 1 and size > 1:  # JAX's "SAME", for images of even size
            x = F.pad(x, (0, 1, 0, 1))
        padding = 0 if stride > 1 else size // 2
        x = F.conv2d(x, layer["w"].permute(3, 2, 0, 1), None, stride, padding)
        x = F.instance_norm(x, weight=layer["scale"], bias=layer["bias"])
        return x

    x = convolve(params["stem"], x.permute(0, 3, 1, 2)).relu()
    for name in sorted(key for key in params if key.startswith("stage")):
        layers = params[name]
        stride = 2 if not name.startswith("stage0") and name.endswith("_0") else 1
        y = convolve(layers["second"], convolve(layers["first"], x, stride).relu())
        skip = convolve(layers["skip"], x, stride) if "skip" in layers else x
        x = (skip + y).relu()
    return x.mean((2, 3)) @ params["out"]
