"""A small ResNet and wrong labels: which methods keep from learning them?

    python benchmarks/papers/small_resnet.py --data DIRECTORY

This trains a ResNet of 175,000 parameters, with batch normalisation, on 10,000 images
of CIFAR-10, with right labels and with 40 and 60 % of them replaced by any of the ten,
so that one in ten of these is right by chance. The network is small enough for two CPU
cores: its first convolution has a stride of 4.

Every method chooses one number by the accuracy on 2,000 validation images with right
labels, from one training each, and is then tested on other seeds, which give the wrong
labels, the first weights and the order. SGD and AdamW choose the learning rate. The
others have SGD's, and choose the radius; `sgd_decay` chooses the weight decay. They try
two values, and go on by factors of two until the best one has worse neighbours, or six
are tried; where training fails with all, smaller values follow. `sgd_twice` is SGD for
twice the epochs, and `late_sam` is SAM in the second half of the epochs.

The statistics of batch normalisation come from the pass at the parameters, for which
momentum-SAM needs a forward pass more, counted as a third of a gradient.
`msam_one_pass` takes them from the pass at the perturbed parameters.

Images are not augmented, so that SGD learns the wrong labels too. With --augment yes,
they are cropped and mirrored, and SGD needs many more epochs for that. Seconds are
those of the CPU, over all threads and in training alone. Sharpness is that of the
training loss at the end, with running statistics: the largest eigenvalue and the trace
of the Hessian.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from cifar10 import (
    State,
    accuracy_percent,
    add_noise,
    crop_and_flip,
    evaluation_loss,
    make_augmented_step,
    measure_sharpness,
    percentage,
    take,
)
from harness import TUNING_SEED, Experiment, Runs, arguments, setting_of
from loaders import load_cifar10
from one_gradient import decayed_adamw
from resnet import ResNet, convolve_by_matmul
from training import PLAIN, decayed_sgd, draw_batches

STEM = (5, 4)  # size and stride of the first convolution
LABELLED_ON_THE_LEFT = {"msam_one_pass", "fsam"}  # so that no labels overlap
FAILED = 15  # % of right answers, where ten are to be had by chance
WATCHED = 2000  # test images that are looked at after each epoch, at most
SETTING = ("learning_rate", "rho", "weight_decay")
CURVES = ["loss", "ascended", "seconds", "test"]  # of each epoch

# --- Methods --------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the tables."""

    method: str  # of `sam_optax.METHODS`, or PLAIN
    first: tuple[float, float] = (0.1, 0.2)  # values that are tried first
    chooses: str = "rho"
    options: tuple[tuple[str, float], ...] = ()
    passes: float = 2  # gradients of a step that ascends
    late: float = 1  # the part of the epochs, at their end, that may ascend
    stretch: int = 1
    like: str = ""  # has the setting that this one chose
    make_base: Callable[[int, float], Callable[[Any], Any]] = decayed_sgd
    weight_decay: float = 5e-4
    value_at: str = "parameters"


ENTRIES = {
    "sgd": Entry(PLAIN, (0.05, 0.1), "learning_rate"),
    "sam": Entry("sam"),
    "msam": Entry("msam", (2.0, 4.0), passes=4 / 3),
    "fsam": Entry("fsam", options=(("sigma", 1.0), ("decay", 0.6))),
    "late_sam": Entry("late_sam", late=0.5),
    "sgd_decay": Entry(PLAIN, (2e-3, 4e-3), "weight_decay"),
    "sgd_twice": Entry(PLAIN, like="sgd", stretch=2),
    "look_sam": Entry("look_sam", options=(("k", 5), ("alpha", 0.7))),
    "asam": Entry("asam", (1.0, 2.0), options=(("eta", 0.01),)),
    "gsam": Entry("gsam", options=(("alpha", 0.1),)),
    "stable_sam": Entry("stable_sam"),
    "adamw": Entry(
        PLAIN, (2e-3, 4e-3), "learning_rate", make_base=decayed_adamw, weight_decay=0.1
    ),
    "msam_one_pass": Entry("msam", passes=1, like="msam", value_at="perturbed"),
}
FIRST = ["sgd", "sam", "msam"]  # tested before others choose


class Program(NamedTuple):
    """What is compiled: an epoch, for all learning rates, radii, seeds and labels."""

    model: ResNet
    entry: Entry
    make_base: Callable[[Any], Any]  # learning rate -> optimizer
    batch_size: int
    augments: bool
    ascends: bool  # or never; then the program has no branch for it

    def build(self, hyper: dict[str, Any]):
        hyper = hyper | dict(self.entry.options)
        base = self.make_base(hyper.pop("learning_rate"))
        augment = crop_and_flip if self.augments else lambda key, images: images
        options: dict[str, Any] = {"value_at": self.entry.value_at}
        return make_augmented_step(
            self.model, self.entry.method, base, hyper, augment, **options
        )

    def init(self, hyper: dict[str, Any], key: jax.Array) -> State:
        return self.build(hyper)[0](key)

    def epoch(self, state: State, hyper: dict[str, Any], key: jax.Array, x, y):
        """The next state, the mean loss, and the part of the steps that ascended."""
        step = self.build(hyper)[1]
        arguments = {} if self.ascends else {"ascend": False}

        def body(state, inputs):
            state, (loss, gradients) = step(state, *inputs, x, y, **arguments)
            return state, (loss, gradients - 1)

        batches = draw_batches(key, len(x), self.batch_size)
        state, seen = jax.lax.scan(body, state, batches)
        return state, *(values.mean() for values in seen)


# --- The experiment -------------------------------------------------------------------


class SmallResNet(Experiment):
    same = ("epochs", "batch", "train", "validation", "test", "width", "blocks")
    same += ("augment",)
    options = arguments(
        data=(None, None, "directory with CIFAR-10", {"required": True}),
        methods=(list(ENTRIES), ["msam"], "which to train, beside SGD and SAM"),
        noises=([40, 0, 60], [40], "%% of random labels", {"type": percentage}),
        seeds=(5, 1, "tests of each method, with the setting it chose"),
        settings=(6, 2, "settings to choose from, at most"),
        epochs=(30, 2, "passes over the training images"),
        batch=(64, 16, "images in a step"),
        train=(10000, 64, "training images, a random part of them"),
        validation=(2000, 16, "of the other training images, to choose settings by"),
        test=(10000, 64, "test images, a random part of them"),
        sharpness=(500, 4, "training images that sharpness is measured on"),
        width=(24, 2, "channels of the first stage"),
        blocks=([1, 1, 1], [1], "residual blocks in each stage"),
        learning_rate=(
            None,
            None,
            "of SGD and of all that would have SGD's (default: what SGD chooses)",
            {"type": float},
        ),
        augment=("no", None, "crop and mirror images", {"choices": ["no", "yes"]}),
    )

    def prepare(self):
        args = self.args
        needed = [ENTRIES[name].like for name in args.methods if ENTRIES[name].like]
        args.methods = list(dict.fromkeys([*FIRST[:2], *needed, *args.methods]))
        data = load_cifar10(args.data)
        data = take(data, args.train + args.validation, args.test)
        self.labels = data.train_y[: args.train]
        self.train_x = jax.device_put(data.train_x[: args.train])
        held_out = data.train_x[args.train :], data.train_y[args.train :]
        self.validation, self.test = map(jax.device_put, (held_out, data[2:]))
        self.model = ResNet(
            tuple(args.blocks), args.width, stem=STEM, convolve=convolve_by_matmul
        )
        # One function for all measurements, so that they are compiled once.
        self.loss_fn = functools.partial(evaluation_loss, self.model)
        self.programs: dict[Program, Callable[..., tuple]] = {}

    def plan(self):
        """In each noise, the first methods come first; then the first seeds of all."""
        names, seeds = self.args.methods, self.args.seeds
        first = [name for name in names if name in FIRST]
        for noise in dict.fromkeys(self.args.noises):
            for some, count in ((first, min(2, seeds)), (names, seeds)):
                for name in some:
                    yield from self.missing(self.trials(name, noise))
                for seed, name in itertools.product(range(count), some):
                    yield from self.missing([self.tested(name, noise, seed)])

    def missing(self, cases: Iterable[dict]) -> Iterator[dict]:
        return (case for case in cases if not self.runs.of(**case))

    def trials(self, name: str, noise: int) -> Iterator[dict]:
        """Cases to choose by: on, by factors of two, while the last is the best."""
        entry = ENTRIES[name]
        if entry.like:
            return
        case = {"method": name, "noise": noise, "on": "validation"}
        case |= {"learning_rate": None, "rho": None, "seed": TUNING_SEED}
        case |= {"weight_decay": entry.weight_decay}
        fixed = self.fixed(name)
        if name == "sgd" and fixed:
            yield case | fixed
            return
        if name != "sgd" and entry.chooses != "learning_rate":
            case |= {"learning_rate": self.choice("sgd", noise)["learning_rate"]}
        tried = list(entry.first[: self.args.settings])
        yield from (case | {entry.chooses: value} for value in tried)
        while len(tried) < self.args.settings:
            # Of these alone, so that a resumed run goes the same way.
            seen = self.runs.of(on="validation", method=name, noise=noise, **fixed)
            seen = [run for run in seen if run[entry.chooses] in tried]
            best = max(seen, key=functools.partial(rank, entry))[entry.chooses]
            if min(tried) < best < max(tried):
                return
            tried.append(best * 2 if best == max(tried) else best / 2)
            yield case | {entry.chooses: tried[-1]}

    def fixed(self, name: str) -> dict[str, float]:
        """The learning rate, if it is given and the method has SGD's."""
        rate, entry = self.args.learning_rate, ENTRIES[name]
        has_own = name != "sgd" and entry.chooses == "learning_rate"
        return {} if rate is None or has_own else {"learning_rate": rate}

    def choice(self, name: str, noise: int) -> dict[str, Any]:
        """The setting of the best validation accuracy; {} if none was tried."""
        tried = {"method": ENTRIES[name].like or name, "noise": noise}
        runs = self.runs.of(on="validation", **tried, **self.fixed(name))
        best = runs.best("validation", *SETTING)[0] if runs else {}
        return {key: best[key] for key in SETTING if best}

    def tested(self, name: str, noise: int, seed: int) -> dict[str, Any]:
        case = {"method": name, "noise": noise, "on": "test"}
        return case | self.choice(name, noise) | {"seed": seed}

    def measure(self, method, noise, on, seed, weight_decay, **setting):
        entry, key = ENTRIES[method], jax.random.key(seed)
        labels = add_noise(self.labels, noise, seed)
        examples = self.train_x, jax.device_put(labels)
        state, curves = self.train(
            entry, weight_decay, setting_of(setting), key, examples
        )
        ascended = float(np.mean(curves["ascended"]))
        found = {
            "gradients": entry.stretch * (1 + ascended * (entry.passes - 1)),
            "seconds": sum(curves["seconds"]),
            "validation": self.accuracy(state, *self.validation),
            "train": self.accuracy(state, *examples),
            "test": self.accuracy(state, *self.test),
            "highest": max(curves["test"]),
        }
        if on == "test":
            replaced = labels != self.labels
            # No prediction is -1, so that the right labels do not count.
            wrong = jax.device_put(np.where(replaced, labels, -1))
            count = self.accuracy(state, self.train_x, wrong) * len(labels)
            found["wrong_learned"] = count / max(replaced.sum(), 1)
            some = [values[: self.args.sharpness] for values in examples]
            found |= measure_sharpness(self.loss_fn, state, *some)
            found["curves"] = curves
        return found

    def train(self, entry: Entry, weight_decay, hyper, key, examples):
        """The state at the end, and the curves of CURVES."""
        args, points = self.args, []
        epochs = entry.stretch * args.epochs
        base = entry.make_base(epochs * (args.train // args.batch), weight_decay)
        settings = (self.model, entry, base, args.batch, args.augment == "yes")
        state = Program(*settings, False).init(hyper, key)
        watched = [values[:WATCHED] for values in self.test]
        for epoch in range(epochs):
            ascends = entry.method != PLAIN and epoch >= (1 - entry.late) * epochs
            inputs = state, hyper, jax.random.fold_in(key, epoch), *examples
            run = self.compiled(Program(*settings, ascends), *inputs)
            start = time.process_time()
            state, *means = jax.block_until_ready(run(*inputs))
            seconds = time.process_time() - start
            point = [*map(float, means), seconds, self.accuracy(state, *watched)]
            points.append(point)
        curves = map(list, zip(*points, strict=True))
        return state, dict(zip(CURVES, curves, strict=True))

    def compiled(self, program: Program, *inputs: Any) -> Callable[..., tuple]:
        if program not in self.programs:
            function = jax.jit(program.epoch, donate_argnums=0)
            self.programs[program] = function.lower(*inputs).compile()
        return self.programs[program]

    def accuracy(self, state: State, x, y) -> float:
        return accuracy_percent(self.model, state, x, y)

    def report(self):
        for noise in sorted(self.runs.values("noise")):
            # A later choice of another setting leaves the tests of the earlier one out.
            groups = {
                name: self.runs.of(**setting, method=name, noise=noise, on="test")
                for name in ENTRIES
                if (setting := self.choice(name, noise))
            }
            groups = {name: group for name, group in groups.items() if group}
            if not groups:
                continue
            columns: dict = {
                "gradients": ("gradients", 2),
                "seconds": ("seconds", 0),
                "seeds": lambda group: str(len(group)),
                "learning rate": "learning_rate",
                "rho": "rho",
                "weight decay": "weight_decay",
                "test": ("test", 1),
                "less SGD's": ("test", 1, "sgd"),
                "less SAM's": ("test", 1, "sam"),
                "highest": ("highest", 1),
                "train": ("train", 1),
                "wrong learned": ("wrong_learned", 1),
                "eigenvalue": ("eigenvalue", 1),
                "trace": ("trace", 0),
            }
            title = f"{noise} % wrong"
            self.summary(title, groups, columns)
            base = np.mean(groups["sgd"].column("seconds")) if "sgd" in groups else 1
            for key, unit in (("gradients", 1), ("seconds", base)):
                draw = functools.partial(draw_points, title, groups, key, unit)
                self.panels.append(draw)
            curves = {name: Runs(g.column("curves")) for name, g in groups.items()}
            self.draw(title, {k: g for k, g in curves.items() if k in FIRST}, "test")
        self.report_trials()

    def report_trials(self):
        """What every method tried, and how good that was on validation images."""
        rows = []
        for (name, entry), noise in itertools.product(
            ENTRIES.items(), sorted(self.runs.values("noise"))
        ):
            runs = self.runs.of(on="validation", method=name, noise=noise)
            tried = sorted((run[entry.chooses], run["validation"]) for run in runs)
            cells = [f"{value:g}: {accuracy:.1f}" for value, accuracy in tried]
            if cells:
                rows.append([name, str(noise), entry.chooses, ", ".join(cells)])
        self.table(("method", "% wrong", "chooses", "validation"), rows)


def rank(entry: Entry, run: dict[str, Any]) -> tuple[float, float]:
    """By accuracy; of values with which training fails, the smallest comes first."""
    accuracy = run["validation"] if run["validation"] > FAILED else 0
    return accuracy, -run[entry.chooses]


def draw_points(title: str, groups: dict[str, Runs], key: str, unit: float, axes):
    """Mean and standard error of each method; those that lie together share a label."""
    labels: dict[tuple[float, float], list[str]] = {}
    close = 0.06 * np.ptp([np.mean(group.column("test")) for group in groups.values()])
    for name, group in groups.items():
        accuracy, cost = group.column("test"), np.mean(group.column(key)) / unit
        error = np.std(accuracy) / max(len(accuracy) - 1, 1) ** 0.5
        mean = float(np.mean(accuracy))
        colour = colour_of(name)
        axes.errorbar(cost, mean, error, color=colour, marker="o", ms=4)
        near = [
            p for p in labels if abs(p[0] - cost) < 0.2 and abs(p[1] - mean) < close
        ]
        labels.setdefault(near[0] if near else (cost, mean), []).append(name)
    for place, names in labels.items():
        is_left = not LABELLED_ON_THE_LEFT.isdisjoint(names)
        offset = {"xytext": (-8 if is_left else 8, 0), "textcoords": "offset points"}
        style = {"color": colour_of(names[0]), "fontsize": 6, "va": "center"}
        style["ha"] = "right" if is_left else "left"
        axes.annotate("\n".join(names), place, **offset, **style)
    axes.set(title=title, xlabel=f"{key}, of those of SGD", ylabel="test (%)")
    axes.set_xlim(0.5, 3)
    axes.margins(y=0.15)


def colour_of(name: str) -> str:
    return "tab:blue" if "msam" in name else "black" if name in FIRST else "0.5"


if __name__ == "__main__":
    SmallResNet.main()
