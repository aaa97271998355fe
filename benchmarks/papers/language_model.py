"""What sharpness-aware training leaves a language model: rounding and forgetting.

    python benchmarks/papers/language_model.py

This trains a decoder of two blocks on 256,000 characters of English, the topics of
Python's `help()`, for three passes, and then fine-tunes it on the source code of three
modules of Python. Measured are the loss of the next character, in nats, before and
after the weights are rounded to 8, 4 and 3 bits; the loss on the first text after the
fine-tuning; and the sharpness. Nothing is downloaded.

Every method chooses among its settings by the loss on validation text, and is then
tested on new seeds. `adamw_twice` is AdamW for twice the passes, which is the time of
SAM, `adamw_decay` chooses its weight decay too, and `late_sam` is SAM on the last half
of the steps. Afterwards each method chooses again, by the validation loss with weights
of 4 bits, and is tested with that as well.

All models are fine-tuned twice: with AdamW, which is the same for all, and with the
method that trained them, at its radius. The sharpness is that of the loss on training
text: the surrogate gap for a radius of 0.1, and the largest eigenvalue of the Hessian.
"""

import argparse
import inspect
import operator
import time
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from harness import Experiment, Runs, arguments, setting_of, tuned
from loaders import load_text
from one_gradient import Entry, Task, decayed_adamw
from sam_optax import sharpness
from training import PLAIN, losses_of, make_trainer

WINDOW, WIDTH, HEADS, BLOCKS, ALPHABET = 64, 48, 4, 2, 128
TASK = Task(
    sizes=(4000, 600),  # windows to train on, for validation
    batch_size=16,
    epochs=3,
    make_base=decayed_adamw,
    rates=(1e-2, 5e-3, 2e-2, 2.5e-3),
    decays=(1e-4, 0.1, 0.3, 1.0),
    rhos=(0.03, 0.1, 0.01),
)
TESTED = 800  # windows of each text
FINE_TUNED, FINE_EPOCHS, FINE_RATE = 1000, 2, 2e-3  # windows of the second text
BITS = (8, 4, 3)
GAP_RHO, MEASURED, CURVED = 0.1, 128, 32  # training windows: of the gap, the Hessian
ENTRIES = {
    "adamw": Entry(PLAIN),
    "sam": Entry("sam"),
    "msam": Entry("msam", 4, 1),
    "late_sam": Entry("late_sam", 2, late=0.5),
    "adamw_decay": Entry(PLAIN, tries_decays=True),
    "adamw_twice": Entry(PLAIN, stretch=2),
}
BASELINES = ["adamw", "sam"]
FOR_4_BITS = "test for 4 bits"
ASCENDED = operator.attrgetter("ascended")  # one, so that trainers are found again

# --- The model, and its texts ---------------------------------------------------------


class Decoder(nn.Module):
    """Predicts the next character; normalises before each part of a block."""

    @nn.compact
    def __call__(self, x):
        place = self.param("place", nn.initializers.normal(0.02), (WINDOW, WIDTH))
        h = nn.Embed(ALPHABET, WIDTH)(x) + place
        is_past = np.tri(WINDOW, dtype=bool)
        for _ in range(BLOCKS):
            heads = (*x.shape, 3, HEADS, WIDTH // HEADS)
            parts = nn.Dense(3 * WIDTH)(nn.LayerNorm()(h)).reshape(heads)
            q, k, v = (parts[:, :, i].swapaxes(1, 2) for i in range(3))
            scores = q @ k.swapaxes(2, 3) / (WIDTH / HEADS) ** 0.5
            weights = nn.softmax(jnp.where(is_past, scores, -1e9))
            h += nn.Dense(WIDTH)((weights @ v).swapaxes(1, 2).reshape(h.shape))
            h += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(h))))
        return nn.Dense(ALPHABET)(nn.LayerNorm()(h))


def load_code() -> str:
    """Some 344,000 characters of source code, of modules of this Python."""
    return "\n".join(map(inspect.getsource, (argparse, inspect, typing)))


def windows(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(characters, the characters that follow each) of windows that do not overlap."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    count = (len(codes) - 1) // WINDOW
    x, y = codes[: count * WINDOW], codes[1 : count * WINDOW + 1]
    return x.reshape(count, WINDOW), y.reshape(count, WINDOW)


def divide(data: tuple, sizes: tuple[int, ...], seed: int) -> list[tuple]:
    """Parts of these sizes by the seed, and last the test, the same for every seed."""
    order = np.random.default_rng(0).permutation(len(data[0]))
    test, rest = np.split(order, [TESTED])
    rest = np.random.default_rng(seed).permutation(rest)
    *places, _ = np.split(rest, np.cumsum(sizes))
    return [tuple(part[place] for part in data) for place in (*places, test)]


# --- Measures -------------------------------------------------------------------------


def round_to_bits(w: jax.Array, bits: int) -> jax.Array:
    """Rounds a matrix to the nearest of 2^bits − 1 values, symmetric around zero.

    The values are equally spaced, and the largest is the largest |w| of the column:
    every output of a linear layer has a scale of its own.
    """
    levels = 2 ** (bits - 1) - 1
    scale = jnp.abs(w).max(0) / levels
    return jnp.round(w / jnp.where(scale > 0, scale, 1)) * scale


def round_kernels(params: Any, bits: int) -> Any:
    """Rounds the matrices of the linear layers; the rest of the model stays."""

    def rounded(path, w):
        return round_to_bits(w, bits) if path[-1].key == "kernel" else w

    return jax.tree.map_with_path(rounded, params)


def mean_loss(params, x, y) -> jax.Array:
    return losses_of(Decoder(), params, x, y)[0].mean()


evaluate = jax.jit(mean_loss)


def loss_of(params, x, y) -> float:
    return float(evaluate(params, x, y))


def sharpness_of(params, x, y) -> dict[str, float]:
    gap = sharpness.surrogate_gap(
        mean_loss, params, (x[:MEASURED], y[:MEASURED]), rho=GAP_RHO
    )
    matrix = sharpness.hessian(mean_loss, params, (x[:CURVED], y[:CURVED]))
    (eigenvalue,) = sharpness.eigenpairs(matrix, 1, num_matvecs=15).values
    return {"gap": float(gap.sharpness), "eigenvalue": float(eigenvalue)}


# --- The experiment -------------------------------------------------------------------


class LanguageModel(Experiment):
    same = ("settings", "train", "epochs")
    options = arguments(
        methods=(list(ENTRIES), ["msam"], "which to train"),
        seeds=(5, 1, "trainings of each method, with the setting it chose"),
        tuning_seeds=(1, None, "trainings of each setting, for the choice"),
        settings=(9, 1, "settings to choose from, at most"),
        train=(4000, 32, "windows to train on, at most"),
        epochs=(3, 1, "passes over the windows"),
    )

    def prepare(self):
        self.args.methods = list(dict.fromkeys([*BASELINES, *self.args.methods]))
        self.texts = windows(load_text()), windows(load_code())

    def settings(self, method: str) -> list[dict]:
        return ENTRIES[method].settings(TASK)[: self.args.settings]

    def plan(self):
        for method in self.args.methods:
            seeds = (self.args.tuning_seeds, self.args.seeds)
            settings = self.settings(method)
            yield from tuned(self.runs, {"method": method}, settings, *seeds, sign=-1)
        for method in self.args.methods:
            setting = self.choice(method, "validation_4_bits")
            if setting != self.choice(method, "validation"):
                case = {"method": method, "on": FOR_4_BITS} | setting
                yield from (case | {"seed": i} for i in range(self.args.seeds))

    def choice(self, method: str, by: str) -> dict:
        """The setting of the least validation loss; the only one, where there is."""
        settings = self.settings(method)
        tried = self.runs.of(on="validation", method=method)
        if not tried:
            return settings[0]
        best = tried.best(by, *settings[0], sign=-1)[0]
        return {key: best[key] for key in settings[0]}

    def measure(self, on, method, seed, weight_decay, **setting):
        train, validation = (min(self.args.train, size) for size in TASK.sizes)
        text, *others = divide(self.texts[0], (train, validation), seed)
        code, test_of_code = divide(self.texts[1], (min(train, FINE_TUNED),), seed)
        parts = dict(zip(("validation", "test"), others, strict=True))
        entry, hyper, start = ENTRIES[method], setting_of(setting), time.perf_counter()
        epochs = entry.stretch * self.args.epochs
        params, ascended = train_on(text, entry, hyper, weight_decay, epochs, seed)
        found = {
            "gradients": entry.stretch * (1 + ascended * (entry.passes - 1)),
            "seconds": time.perf_counter() - start,
            "train": loss_of(params, *(part[:TESTED] for part in text)),
            **sharpness_of(params, *text),
        }
        for name, part in parts.items():
            found[name] = loss_of(params, *part)
            for bits in BITS:
                rounded = round_kernels(params, bits)
                found[f"{name}_{bits}_bits"] = loss_of(rounded, *part)
        parts["code"] = test_of_code
        found["code"] = loss_of(params, *test_of_code)
        for way, tuner in (("fine", ENTRIES["adamw"]), ("own", entry)):
            if way == "own" and entry.method == PLAIN:  # the same again
                found |= {f"own_{name}": found[f"fine_{name}"] for name in parts}
                continue
            given = hyper if way == "own" else {}
            given = given | {"learning_rate": FINE_RATE}
            args = (code, tuner, given, TASK.decays[0], FINE_EPOCHS, seed, params)
            after, _ = train_on(*args)
            for name, part in parts.items():
                found[f"{way}_{name}"] = loss_of(after, *part)
        found["forgotten"] = found["fine_test"] - found["test"]
        found["own_forgotten"] = found["own_test"] - found["test"]
        return found

    def tested(self, by: str) -> dict[str, Runs]:
        """Of each method, the tests with the setting that it chose."""
        on = FOR_4_BITS if by == "validation_4_bits" else "test"
        tests, found = self.runs.of(on="test"), {}
        for method in tests.values("method"):
            chosen = {"method": method} | self.choice(method, by)
            found[method] = self.runs.of(on=on, **chosen) or tests.of(**chosen)
        return {method: group for method, group in found.items() if group}

    def report(self):
        for run in self.runs:
            run |= {f"rise_{b}": run[f"test_{b}_bits"] - run["test"] for b in BITS}
        groups, by_4_bits = map(self.tested, ("validation", "validation_4_bits"))
        columns = {
            "gradients": ("gradients", 2),
            "learning rate": "learning_rate",
            "rho": "rho",
            "weight decay": "weight_decay",
            "train": ("train", 3),
            "test": ("test", 3),
            "less adamw's": ("test", 3, "adamw"),
            "less adamw_twice's": ("test", 3, "adamw_twice"),
            "gap": ("gap", 3),
            "eigenvalue": ("eigenvalue", 1),
            "eigenvalue less adamw's": ("eigenvalue", 1, "adamw"),
        }
        self.summary("loss", groups, columns)
        for title, chosen in (("rounded", groups), ("chosen by 4 bits", by_4_bits)):
            columns = {"rho": "rho"} if chosen is by_4_bits else {}
            for bits in ("", *(f"_{bits}_bits" for bits in BITS)):
                columns |= {f"test{bits}": (f"test{bits}", 3)}
            for bits in BITS[1:]:
                columns[f"less adamw's, {bits}"] = (f"test_{bits}_bits", 3, "adamw")
                columns[f"rise, {bits}"] = (f"rise_{bits}", 3)
                columns[f"rise less adamw's, {bits}"] = (f"rise_{bits}", 3, "adamw")
            self.summary(title, chosen, columns)
            self.report_forgetting(title, chosen)
        self.report_radii()
        self.panels += [draw_rounding(groups), draw_forgetting(groups)]
        self.panels += [self.draw_radii()]

    def report_forgetting(self, title, groups):
        columns = {
            name: (key, 3)
            for name, key in {
                "first text before": "test",
                "after AdamW": "fine_test",
                "second text": "fine_code",
                "after its own": "own_test",
                "second text, own": "own_code",
            }.items()
        }
        columns["forgotten"] = ("forgotten", 3)
        columns |= {"forgotten less adamw's": ("forgotten", 3, "adamw")}
        columns |= {"its own, less adamw's": ("own_forgotten", 3, "adamw")}
        self.summary(f"fine-tuned, {title}", groups, columns)

    def report_radii(self):
        """Of the settings that were tried, what each radius gives on validation."""
        keys = ("validation", "validation_8_bits", "validation_4_bits")
        keys += ("validation_3_bits", "fine_validation", "fine_code", "gap")
        rows = []
        for run in self.runs.of(on="validation"):
            setting = [f"{run[key] or '':}" for key in ("rho", "weight_decay")]
            name = f"{run['method']}, {run['learning_rate']:g}"
            rows.append([name, *setting, *(f"{run[key]:.3f}" for key in keys)])
        self.table(("tried", "rho", "weight decay", *keys), rows)

    def draw_radii(self) -> Callable[[Any], None]:
        tried = self.runs.of(on="validation") or self.runs

        def draw(axes):
            for i, (method, group) in enumerate(tried.by("method").items()):
                x, y = (group.column(f"validation{b}") for b in ("", "_4_bits"))
                rounding = np.subtract(y, x)
                axes.plot(x, rounding, ".", label=method, color=f"C{i}", alpha=0.8)
            axes.set(
                title="each setting that was tried",
                xlabel="validation loss",
                ylabel="rise by rounding to 4 bits",
                yscale="log",
            )
            axes.legend(fontsize=6)
            axes.grid(alpha=0.3)

        return draw


def train_on(data, entry: Entry, hyper, decay, epochs, seed, params=None):
    """The last parameters, and the share of the steps that ascended."""
    batch_size = min(TASK.batch_size, len(data[0]))
    steps = epochs * (len(data[0]) // batch_size)
    late = {"start": round((1 - entry.late) * steps)} if entry.late < 1 else {}
    trainer = make_trainer(
        Decoder(),
        entry.method,
        TASK.make_base(steps, decay),
        batch_size,
        watch=ASCENDED,
    )
    hyper, key, ascended = hyper | late, jax.random.key(seed), []
    state = trainer.init(hyper, key, data[0])
    if params is not None:
        state = state._replace(params=params)
    for _ in range(epochs):
        state, seen = trainer.epoch(state, hyper, key, *data)
        ascended.append(np.mean(seen))
    return state.params, float(np.mean(ascended))


def draw_rounding(groups: dict[str, Runs]) -> Callable[[Any], None]:
    """The loss against the bits, with a line for each method."""
    keys = {"32": "test", **{str(bits): f"test_{bits}_bits" for bits in BITS}}

    def draw(axes):
        for i, (method, group) in enumerate(groups.items()):
            means, errors = zip(
                *((np.mean(c), np.std(c)) for c in map(group.column, keys.values())),
                strict=True,
            )
            places = np.arange(len(keys)) + 0.05 * (i - len(groups) / 2)
            axes.errorbar(places, means, errors, lw=1, marker=".", label=method)
        axes.set_xticks(range(len(keys)), keys)
        axes.set(title="rounded weights", xlabel="bits", ylabel="test loss")
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)

    return draw


def draw_forgetting(groups: dict[str, Runs]) -> Callable[[Any], None]:
    """The first text against the second, after fine-tuning: AdamW ●, its own ×."""

    def draw(axes):
        for i, (method, group) in enumerate(groups.items()):
            for name, marker in (("fine", "o"), ("own", "x")):
                x, y = (group.column(f"{name}_{part}") for part in ("code", "test"))
                label = method if name == "fine" else None
                style = {"color": f"C{i}", "markersize": 4, "alpha": 0.7}
                axes.plot(x, y, marker, label=label, **style)
        axes.set(
            title="fine-tuned: ● by AdamW, × by its own",
            xlabel="loss on the second text",
            ylabel="loss on the first text",
        )
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)

    return draw


if __name__ == "__main__":
    LanguageModel.main()
