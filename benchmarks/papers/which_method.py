"""Which method? All of the library on digits and MNIST: accuracy beside cost.

    python benchmarks/papers/which_method.py --data DIRECTORY

This trains SGD, every method of `sam_optax.METHODS`, and some data rules, with right
labels and with 40 % of the training labels replaced by random ones (one in ten of these
is right by chance). SGD also runs for twice the epochs, which is the cost of SAM.
MNIST's images are all from its test set, of which DIRECTORY has the files; without
--data, only the digits are there. Test images are the same for every seed; the others
are divided anew for each.

Every method chooses among eight settings by its mean accuracy on validation images, and
is then tested on new seeds. For SGD these are eight learning rates; for `sgd_decay`,
two learning rates times four weight decays; for the others, two learning rates times
four radii, which are those of SAM times a number for the method, as RHOS and UNITS
below say. What else a method has is as the library has it by default, except that
`sagm` descends on the mean of its two gradients, as its authors' code does, because
their sum doubles the learning rate; that LE-SAM chooses σ in the place of ρ, which is
only its largest radius, and `universal_sam` the weight λ of its sharpness; and that
SAMPa is told the base optimizer. `msam_0.5` is momentum-SAM with a decay of 0.5,
`late_sam_0.3` is SAM on the last 30 % of the steps, and `sub_batch_4` takes the ascent
gradient of 4 images. `sam_on` is left out: it perturbs normalisation layers alone, and
these networks have none.

Gradients are counted on the steps that take them, a forward pass as a third of one.
Time is that of the processor, measured afterwards, in rounds in which every method
trains for some 180 steps.
"""

import functools
import inspect
import itertools
import math
import operator
import time
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

import sam_optax
from harness import Experiment, Runs, arguments, cases, describe, setting_of, tuned
from loaders import load_digits, load_mnist_test, split
from training import (
    MLP,
    PLAIN,
    Trainer,
    decayed_sgd,
    make_trainer,
    what_sampa_knows,
)

BATCH_SIZE = 64
NOISES = [0, 40]  # % of the training labels
ROUNDS, TIMED_STEPS = 15, 180

WEIGHT_DECAY = 5e-4
DECAYS = [2e-3, 5e-3, 1e-2, 2e-2]  # of the entry that chooses it
SGD_RATES = [0.05, 0.1, 0.025, 0.2, 0.0125, 0.4, 0.006, 0.003]
RATES = [0.1, 0.025]
RHOS = [0.06, 0.12, 0.25, 0.5]
# For the same range to be of use: where the paper says so (ASAM, ten times), where the
# gap counts more than once (its weight in WSAM is 9), where not all steps ascend, and
# where rho is not the length of ε, or ε not along g. From validation images only.
UNITS = {
    **dict.fromkeys(("asam", "fasam", "stable_asam"), 10),
    **dict.fromkeys(("usam", "stable_usam", "rst", "ae_sam"), 2),
    **{"sam_every_k": 3, "sam_plus_gap": 0.5, "wsam": 0.1, "random_sam": 40},
    **{"msam": 4, "late_sam": 2, "sampa": 2, "sagm": 2, "gam": 2, "universal_sam": 2},
    **{"le_sam": 0.5, "layerwise_sam": 0.2, "lpf_sgd": 0.1},
}
VARIED = ("msam", "late_sam")  # not with their defaults
LEFT_OUT = ("sam_on",)
# Methods that ascend on some steps only, and then take two gradients.
SOMETIMES = ("look_sam", "sam_every_k", "rst", "ae_sam", "ae_look_sam")
SIZES = {"digits": (700, 300), "mnist": (2000, 1000)}  # to train on, for validation
WIDTHS = {"digits": (128, 128, 10), "mnist": (64, 64, 10)}
FORWARD = 1 / 3  # of a gradient
RADII = {
    "le_sam": "sigma",
    "universal_sam": "lam",
}  # what is chosen in the place of rho


def passes_of(name: str) -> float:
    """Gradients of a step that ascends."""
    if name in SOMETIMES:
        return 2
    record = sam_optax.METHODS[name]
    return record.gradients() + FORWARD * ("a forward pass" in record.cost)


def as_released(learning_rate) -> dict[str, bool]:
    del learning_rate
    return {"as_released": True}


# Of the base's steps and weight decay: `further` of `make_trainer`.
FURTHER = {"sagm": lambda *_: as_released, "sampa": what_sampa_knows}
ASCENDED = operator.attrgetter("ascended")  # what the trainings watch


class Entry(NamedTuple):
    """A line of the tables."""

    method: str  # of `sam_optax.METHODS`, or PLAIN
    unit: float = 1  # RHOS are multiplied by it
    passes: float = 2  # gradients of a step that ascends
    rule: sam_optax.data.DataRule | None = None  # which examples the two gradients see
    stretch: int = 1  # how many times the epochs of the others it trains
    tries_decays: bool = False  # whether it chooses its weight decay
    late: float = 1  # the part of the steps, at their end, that may ascend
    options: tuple[tuple[str, float], ...] = ()  # further arguments of the method

    def settings(self) -> list[dict]:
        if self.tries_decays:
            pairs = itertools.product(DECAYS, RATES)
            return [
                {"learning_rate": rate, "rho": None, "weight_decay": decay}
                for decay, rate in pairs
            ]
        if self.method == PLAIN:
            return [{"learning_rate": rate, "rho": None} for rate in SGD_RATES]
        pairs = itertools.product(RHOS, RATES)
        return [{"learning_rate": rate, "rho": self.unit * rho} for rho, rate in pairs]

    def hyper(self, setting: dict, key: jax.Array, steps: int) -> dict:
        """With a key where the method draws, so that each seed has its own."""
        made = sam_optax.METHODS.get(self.method)
        draws = made and "key" in inspect.signature(made.make).parameters
        more: dict = {"key": jax.random.fold_in(key, 1)} if draws else {}
        more |= {"start": round((1 - self.late) * steps)} if self.late < 1 else {}
        numbers = setting_of(setting)
        if self.method in RADII:
            numbers[RADII[self.method]] = numbers.pop("rho")
        return numbers | more | dict(self.options)

    def epochs(self, task: str, steps: int) -> int:
        return self.stretch * math.ceil(steps / (SIZES[task][0] // BATCH_SIZE))

    def trainer(self, task: str, steps: int, weight_decay=WEIGHT_DECAY) -> Trainer:
        base = decayed_sgd(steps, weight_decay)
        options = {"data": self.rule, "watch": ASCENDED}
        if self.method in FURTHER:
            options["further"] = FURTHER[self.method](steps, weight_decay)
        model = MLP(WIDTHS[task])
        return make_trainer(model, self.method, base, BATCH_SIZE, **options)


def momentum_sam(decay: float) -> Entry:
    return Entry("msam", UNITS["msam"], 1, options=(("decay", decay),))


def late_sam(share: float) -> Entry:
    return Entry("late_sam", UNITS["late_sam"], late=share)


HALF, K = sam_optax.data.largest_increase(0.5), sam_optax.data.k_sam(BATCH_SIZE // 2)
ENTRIES = {
    "sgd": Entry(PLAIN),
    "sgd_twice": Entry(PLAIN, stretch=2),
    **{
        name: Entry(name, UNITS.get(name, 1), passes_of(name))
        for name in sam_optax.METHODS
        if name not in VARIED + LEFT_OUT
    },
    "sgd_decay": Entry(PLAIN, tries_decays=True),
    **{f"msam_{decay}": momentum_sam(decay) for decay in (0, 0.5, 0.9)},
    **{f"late_sam_{share}": late_sam(share) for share in (0.3, 0.5)},
    "esam": Entry("esam", 1, 1.5 + FORWARD, HALF),  # with its mask
    "largest_increase": Entry("sam", 1, 1.5 + FORWARD, HALF),
    "sub_batch": Entry("sam", 1, 1.25, sam_optax.data.sub_batch(0.25)),
    "sub_batch_4": Entry("sam", 2, 1 + 1 / 16, sam_optax.data.sub_batch(1 / 16)),
    "k_sam": Entry("sam", 1, 1 + FORWARD, K),
}
BASELINES = ["sgd", "sgd_twice", "sam"]


def gradients_of(group: Runs) -> str:
    return f"{np.mean(group.column('gradients')):.2f}"


def clearly(runs: Runs, sam: Runs) -> str:
    """Whether accuracies are above or below SAM's, by the 95 % interval; or neither."""
    pairs = runs.less(sam, "test")
    if not abs(pairs.mean) > pairs.half_width:
        return " "
    return "▲" if pairs.mean > 0 else "▼"


def relative_time(runs: Runs, method: str, task: str) -> float:
    """Of a training to one of SGD, the median over the rounds; NaN if not timed."""
    timed = runs.of(on="time", task=task)
    mine, sgd = (timed.column("seconds", method=name) for name in (method, "sgd"))
    if len(mine) < max(len(sgd), 1):  # of a command before, which --resume has kept
        return math.nan
    return ENTRIES[method].stretch * float(np.median(np.divide(mine, sgd)))


class WhichMethod(Experiment):
    same = ("tuning_seeds", "settings", "steps")
    options = arguments(
        data=(None, None, "directory with the files of MNIST, or else digits alone"),
        methods=(list(ENTRIES), ["sam", "look_sam"], "which to train"),
        seeds=(10, 2, "trainings of each method, with the setting it chose"),
        tuning_seeds=(3, 1, "trainings of each setting, for the choice"),
        settings=(8, 2, "settings to choose from, at most"),
        steps=(600, 20, "of each training, and up to a whole epoch"),
    )

    def prepare(self):
        self.args.methods = list(dict.fromkeys([*BASELINES, *self.args.methods]))
        self.data = {"digits": load_digits()}
        if self.args.data:
            self.data["mnist"] = load_mnist_test(self.args.data)
        self.cases = list(cases(task=self.data, noise=NOISES))

    def plan(self):
        methods, seeds = self.args.methods, (self.args.tuning_seeds, self.args.seeds)
        for name, case in itertools.product(methods, self.cases):
            settings = ENTRIES[name].settings()[: self.args.settings]
            yield from tuned(self.runs, {"method": name, **case}, settings, *seeds)
        # All methods in turn, so that what slows the machine slows all of them.
        rounds = range(ROUNDS)
        yield from cases(on=["time"], task=self.data, round=rounds, method=methods)

    def measure(self, on, method, task, seed=0, noise=0, round=None, **setting):
        """Accuracies in %, and what the training cost."""
        entry, steps, key = ENTRIES[method], self.args.steps, jax.random.key(seed)
        epochs = entry.epochs(task, steps)
        steps = epochs * (SIZES[task][0] // BATCH_SIZE)
        decay = setting.get("weight_decay", WEIGHT_DECAY)
        trainer = entry.trainer(task, steps, decay)
        images, *parts = split(*self.data[task], SIZES[task], seed, noise)
        if on == "time":
            timed = ENTRIES["sgd"].epochs(task, TIMED_STEPS)
            # Of which a method that begins late ascends in its share.
            steps = timed * (SIZES[task][0] // BATCH_SIZE)
            hyper = entry.hyper(entry.settings()[0], key, steps)
            state = trainer.init(hyper, key, images[0])
            start = time.process_time()  # other work on the machine does not count
            for _ in range(timed):
                state, _ = trainer.epoch(state, hyper, key, *images)
            jax.block_until_ready(state)
            return {"seconds": time.process_time() - start}
        hyper = entry.hyper(setting, key, steps)
        state, ascended = trainer.fit(hyper, seed, images, epochs)
        validation, test = trainer.accuracies(state, *parts)
        gradients = entry.stretch * (1 + float(np.mean(ascended)) * (entry.passes - 1))
        return {"gradients": gradients, "validation": validation, "test": test}

    def report(self):
        tests, everything = self.runs.of(on="test"), {}
        columns = {"gradients": gradients_of, "time": self.time}  # on the last task
        for case in self.cases:
            title = f"{case['task']}, {case['noise']} % noise"
            everything[title] = groups = self.by_method(tests.of(**case))
            self.report_case(title, groups)
            columns[title] = functools.partial(self.marked, groups)
        self.summary("method", self.by_method(tests), columns)
        self.print("▲ ▼: clearly above, below sam on the same seeds")
        names = [name for name in self.args.methods if ENTRIES[name].method != PLAIN]
        for pair in itertools.combinations(everything, 2) if len(names) > 2 else ():
            means = (
                [np.mean(everything[title][name].column("test")) for name in names]
                for title in pair
            )
            correlation = np.corrcoef(*map(stats.rankdata, means))[0, 1]
            self.print(f"rank correlation, {' and '.join(pair)}: {correlation:.2f}")

    def by_method(self, runs):
        found = runs.by("method")
        return {name: found[name] for name in self.args.methods if name in found}

    def marked(self, groups, group):
        """Accuracies of a method in a case, and whether they clearly differ."""
        mine = groups[group[0]["method"]]
        return f"{describe(mine.column('test'))} {clearly(mine, groups['sam'])}"

    def time(self, group):
        time = relative_time(self.runs, group[0]["method"], group[-1]["task"])
        return "" if math.isnan(time) else f"{time:.2f}"

    def setting(self, group, key):
        """With a star where it is the least or the largest of three or more."""
        chosen = group[0]
        same = {k: chosen[k] for k in ("method", "task", "noise")}
        tried = self.runs.values(key, on="validation", **same)
        is_edge = len(tried) > 2 and chosen[key] in (min(tried), max(tried))
        return f"{chosen[key]:g}{'*' * is_edge}" if chosen[key] else ""

    def report_case(self, title, groups):
        columns = {"gradients": gradients_of, "time": self.time}
        for key in ("learning_rate", "rho"):
            columns[key] = functools.partial(self.setting, key=key)
        columns |= {"test": ("test", 1), "less SGD's": ("test", 1, "sgd")}
        columns |= {"less SAM's": ("test", 1, "sam")}
        self.summary(title, groups, columns)
        self.draw(title, groups, "test", "gradients")
        compared = {k: group for k, group in groups.items() if k not in BASELINES}
        for word, mark in (("better", "▲"), ("worse", "▼")):
            clear = [
                k for k, g in compared.items() if clearly(g, groups["sam"]) == mark
            ]
            self.print(f"clearly {word} than sam: {', '.join(clear) or 'none'}")
        pairs = [group.less(groups["sam"], "test") for group in compared.values()]
        width = np.median([pair.half_width for pair in pairs]) if pairs else 0
        self.print(
            f"of {len(pairs)} equal methods {0.05 * len(pairs):.1f} would be so by "
            f"chance; the intervals are ± {width:.2f} points in the median"
        )


if __name__ == "__main__":
    WhichMethod.main()
