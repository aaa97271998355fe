"""Which method? All of the library on digits and MNIST: accuracy beside cost.

    python benchmarks/papers/which_method.py --data DIRECTORY

trains SGD and every method of `sam_optax.METHODS`, and three that choose examples, with
right labels and with 40 % of the training labels replaced by random ones (one in ten of
these is right by chance). SGD also runs for twice the epochs, the cost of SAM.

Of scikit-learn's digits, 700 images are to train on, 300 for validation and 797 for the
test. Those of MNIST are all from its test set, of which DIRECTORY has the files: 2,000
to train on, 1,000 for validation and 7,000 for the test. Without DIRECTORY, digits
alone. Test images are the same for every seed; the others are divided anew for each.

Batches of 64, momentum 0.9, weight decay 5e-4, a cosine decay of the learning rate, and
a multilayer perceptron. Every method chooses among eight settings by its mean accuracy
on validation images, and is then tested on new seeds. For SGD these are eight learning
rates; for the others, two learning rates times four radii, which are those of SAM times
a number for the method, as RHOS and UNITS below say. What else a method has is as the
library has it by default.

Gradients are counted on the steps that take them, a forward pass as a third of one.
Time is measured afterwards, in rounds in which every method trains for some 60 steps.
"""

import functools
import inspect
import itertools
import math
import time
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from scipy import stats

import sam_optax
from harness import Experiment, Pairs, Runs, cases, describe, setting_of, tuned
from loaders import load_digits, load_mnist_test, split
from training import MLP, PLAIN, Trainer, decayed_sgd, make_trainer

BATCH_SIZE = 64
NOISES = [0, 40]  # % of the training labels
ROUNDS, TIMED_STEPS = 15, 60

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
}
FORWARD = 1 / 3  # of a gradient
# Gradients of a step that ascends, where they are not two.
PASSES = {"random_sam": 1 + FORWARD, "rsam": 2 + FORWARD, "multi_step_sam": 3}


class Entry(NamedTuple):
    """A line of the tables."""

    method: str  # of `sam_optax.METHODS`, or PLAIN
    unit: float = 1  # RHOS are multiplied by it
    passes: float = 2  # gradients of a step that ascends
    rule: sam_optax.data.DataRule | None = None  # which examples the two gradients see
    stretch: int = 1  # how many times the epochs of the others it trains

    def settings(self) -> list[dict]:
        if self.method == PLAIN:
            return [{"learning_rate": rate, "rho": None} for rate in SGD_RATES]
        pairs = itertools.product(RHOS, RATES)
        return [{"learning_rate": rate, "rho": self.unit * rho} for rho, rate in pairs]

    def hyper(self, setting: dict, key: jax.Array) -> dict:
        """With a key where the method draws, so that each seed has its own."""
        methods = sam_optax.METHODS
        make = methods[self.method].make if self.method != PLAIN else setting_of
        draws = "key" in inspect.signature(make).parameters
        more = {"key": jax.random.fold_in(key, 1)} if draws else {}
        return setting_of(setting) | more


def make_entries() -> dict[str, Entry]:
    entries = {"sgd": Entry(PLAIN), "sgd_twice": Entry(PLAIN, stretch=2)}
    for name in sam_optax.METHODS:
        entries[name] = Entry(name, UNITS.get(name, 1), PASSES.get(name, 2))
    half = sam_optax.data.largest_increase(0.5)
    entries["esam"] = Entry("esam", 1, 1.5 + FORWARD, half)  # with its mask
    entries["largest_increase"] = Entry("sam", 1, 1.5 + FORWARD, half)
    entries["sub_batch"] = Entry("sam", 1, 1.25, sam_optax.data.sub_batch(0.25))
    entries["k_sam"] = Entry(
        "sam", 1, 1 + FORWARD, sam_optax.data.k_sam(BATCH_SIZE // 2)
    )
    return entries


ENTRIES = make_entries()
BASELINES = ["sgd", "sgd_twice", "sam"]
SIZES = {"digits": (700, 300), "mnist": (2000, 1000)}  # to train on, for validation
WIDTHS = {"digits": (128, 128, 10), "mnist": (64, 64, 10)}


def epochs_of(name: str, task: str, steps: int) -> int:
    epochs = math.ceil(steps / (SIZES[task][0] // BATCH_SIZE))
    return ENTRIES[name].stretch * epochs


@functools.cache  # settings are no part of the program
def trainer_of(name: str, task: str, epochs: int) -> Trainer:
    entry = ENTRIES[name]
    base = decayed_sgd(epochs * (SIZES[task][0] // BATCH_SIZE))
    options = {"data": entry.rule, "watch": lambda report: report.ascended}
    return make_trainer(MLP(WIDTHS[task]), entry.method, base, BATCH_SIZE, **options)


def seconds(trainer: Trainer, hyper: dict, images: tuple, task: str) -> float:
    key = jax.random.key(0)
    state = trainer.init(hyper, key, images[0])
    start = time.perf_counter()
    for _ in range(epochs_of("sgd", task, TIMED_STEPS)):
        state, _ = trainer.epoch(state, hyper, key, *images)
    jax.block_until_ready(state)
    return time.perf_counter() - start


def is_clear(pairs: Pairs) -> bool:
    """Whether the 95 % interval leaves out zero."""
    return abs(pairs.mean) > pairs.half_width


def gradients_of(group: Runs) -> str:
    return f"{np.mean(group.column('gradients')):.2f}"


def marked(groups: dict[str, Runs], group: Runs) -> str:
    """Accuracies of a method in a case, and whether they clearly differ from SAM's."""
    mine = groups[group[0]["method"]]
    pairs = mine.less(groups["sam"], "test")
    mark = ("▲" if pairs.mean > 0 else "▼") if is_clear(pairs) else " "
    return f"{describe(mine.column('test'))} {mark}"


def time_ratio(runs: Runs, name: str, task: str) -> float:
    """Of a training to one of SGD, the median over the rounds."""
    timed = runs.of(on="time", task=task)
    mine, sgd = (timed.column("seconds", method=method) for method in (name, "sgd"))
    return ENTRIES[name].stretch * float(np.median(np.divide(mine, sgd)))


def edge(runs: Runs, chosen: dict, key: str) -> str:
    """A star where the choice is the least or the largest of three or more."""
    same = {k: chosen[k] for k in ("method", "task", "noise")}
    tried = runs.values(key, on="validation", **same)
    ends = (min(tried), max(tried)) if len(tried) > 2 else ()
    return "*" if chosen[key] in ends else ""


class WhichMethod(Experiment):
    name, doc = "which_method", __doc__
    options: ClassVar = {
        "data": (None, None, "directory with the files of MNIST, or else digits alone"),
        "methods": (list(ENTRIES), ["sam", "look_sam"], "which to train"),
        "seeds": (10, 2, "trainings of each method, with the setting it chose"),
        "tuning_seeds": (3, 1, "trainings of each setting, for the choice"),
        "settings": (8, 2, "settings to choose from, at most"),
        "steps": (600, 20, "of each training, and up to a whole epoch"),
    }

    def prepare(self):
        self.args.methods = list(dict.fromkeys([*BASELINES, *self.args.methods]))
        self.data = {"digits": load_digits()}
        if self.args.data:
            self.data["mnist"] = load_mnist_test(self.args.data)
        self.cases = list(cases(task=self.data, noise=NOISES))

    def plan(self):
        for name, case in itertools.product(self.args.methods, self.cases):
            settings = ENTRIES[name].settings()[: self.args.settings]
            seeds = self.args.tuning_seeds, self.args.seeds
            yield from tuned(self.runs, {"method": name, **case}, settings, *seeds)
        # All methods in turn, so that other work on the machine slows all of them.
        methods = self.args.methods
        yield from cases(
            on=["time"], task=self.data, round=range(ROUNDS), method=methods
        )

    def measure(self, on, method, task, seed=0, noise=0, round=None, **setting):
        """Accuracies in %, and what the training cost."""
        entry, epochs = ENTRIES[method], epochs_of(method, task, self.args.steps)
        trainer = trainer_of(method, task, epochs)
        images, *parts = split(*self.data[task], SIZES[task], seed, noise)
        setting = setting or entry.settings()[0]
        hyper = entry.hyper(setting, jax.random.key(seed))
        if on == "time":
            return {"seconds": seconds(trainer, hyper, images, task)}
        state, ascended = trainer.fit(hyper, seed, images, epochs)
        validation, test = trainer.accuracies(state, *parts)
        gradients = entry.stretch * (1 + float(np.mean(ascended)) * (entry.passes - 1))
        return {"gradients": gradients, "validation": validation, "test": test}

    def report(self):
        tests, everything = self.runs.of(on="test"), {}
        for case in self.cases:
            mine = tests.of(**case)
            title = f"{case['task']}, {case['noise']} % noise"
            groups = {name: mine.of(method=name) for name in self.args.methods}
            everything[title] = groups
            self.report_case(title, groups)
        columns = {"gradients": gradients_of, "time": self.time}  # on the last task
        for title, groups in everything.items():
            columns[title] = functools.partial(marked, groups)
        groups = {name: tests.of(method=name) for name in self.args.methods}
        self.summary("method", groups, columns)
        self.print("▲ ▼: clearly above, below sam on the same seeds")
        names = [name for name in self.args.methods if ENTRIES[name].method != PLAIN]
        for one, other in itertools.combinations(everything, 2):
            means = (
                [np.mean(everything[title][name].column("test")) for name in names]
                for title in (one, other)
            )
            if len(names) > 2:
                correlation = np.corrcoef(*map(stats.rankdata, means))[0, 1]
                self.print(f"rank correlation, {one} and {other}: {correlation:.2f}")

    def time(self, group):
        return f"{time_ratio(self.runs, group[0]['method'], group[-1]['task']):.2f}"

    def setting(self, group, key):
        chosen = group[0]
        return f"{chosen[key]:g}{edge(self.runs, chosen, key)}" if chosen[key] else ""

    def report_case(self, title, groups):
        columns = {"gradients": gradients_of, "time": self.time}
        for key in ("learning_rate", "rho"):
            columns[key] = functools.partial(self.setting, key=key)
        columns |= {"test": ("test", 1), "less SGD's": ("test", 1, "sgd")}
        columns |= {"less SAM's": ("test", 1, "sam")}
        self.summary(title, groups, columns)
        self.draw(title, groups, "test", "gradients")
        compared = {k: group for k, group in groups.items() if k not in BASELINES}
        pairs = {k: g.less(groups["sam"], "test") for k, g in compared.items()}
        for word, sign in (("better", 1), ("worse", -1)):
            clear = [k for k, p in pairs.items() if is_clear(p) and sign * p.mean > 0]
            self.print(f"clearly {word} than sam: {', '.join(clear) or 'none'}")
        width = np.median([p.half_width for p in pairs.values()]) if pairs else 0
        self.print(
            f"of {len(pairs)} equal methods {0.05 * len(pairs):.1f} would be so by "
            f"chance; the intervals are ± {width:.2f} points in the median"
        )


if __name__ == "__main__":
    WhichMethod.main()
