"""The scripts of benchmarks/papers run and measure right, and so does their harness."""

import importlib
import json
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

import cifar10
import friendly
import harness
import loaders
import one_example
import one_gradient_figure
import which_method


def experiment(name):
    importlib.import_module(name)
    kinds = harness.Experiment.__subclasses__()
    return next(kind for kind in kinds if kind.__module__ == name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Files like those of MNIST, from scikit-learn's digits, and of CIFAR-10."""
    directory = tmp_path_factory.mktemp("papers")
    images, labels = loaders.load_digits()
    images = np.pad(np.kron(15 * images, np.ones((1, 3, 3), np.uint8)), 2)[2:-2]
    which = np.arange(2200) % len(images)
    np.savez(directory / "mnist_t10k.npz", image=images[which], label=labels[which])
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {b"data": rng.integers(0, 256, (16, 3072), np.uint8)}
        content[b"labels"] = (np.arange(16) * 10 // 16).tolist()
        (directory / name).write_bytes(pickle.dumps(content))
    return directory


def fastest_circles_less_with_stable_sam(runs):
    fastest = harness.Runs(run for run in runs if run["learning_rate"] > 0.29)
    (sam,) = fastest.column("near_percent", method="SAM", rho=0.5)
    (stable,) = fastest.column("near_percent", method="StableSAM", rho=0.5)
    return sam < 1 < 60 < stable < 75


def sam_ends_flatter(runs):
    gd, least, *_ = (np.array(r["eigenvalues"]) for r in runs.of(function="valley"))
    sharp = runs.column("flat_percent", function="two minima", rho=0.03)[0]
    return np.mean(least < gd) > 0.95 and gd.mean() > 2 and sharp == 0


def validation_chooses_and_new_seeds_test(runs):
    tried, tests = (runs.of(method="SAM", on=on) for on in ("validation", "test"))
    best = harness.setting_of(min(tried, key=lambda run: run["loss"]))
    seeds = set(tried.column("seed")) & set(tests.column("seed"))
    return harness.setting_of(tests[0]) == best and not seeds


def gap_estimates_the_curvature(runs):
    errors = [run["estimate"] - 2 * run["gap"] / run["rho"] ** 2 for run in runs]
    worst = all(run["worst_estimate"] > 0.999 * run["estimate"] for run in runs)
    return worst and len(runs) == 6 and np.abs(errors).max() < 1e-5


def look_sam_ascends_on_4_of_20_steps(runs):
    names = ("sgd", "sgd_twice", "sam", "look_sam")
    found = [runs.of(on="test", method=name)[0]["gradients"] for name in names]
    return found == pytest.approx([1, 2, 2, 1.2])


def momentum_sam_takes_one_gradient(runs):
    cosines = runs.of(method="msam_0.9")[0]["probes"]["cosine"]
    gradients = [1] * 3 + [2] * 3 + [1] * 3  # of three cases each
    return runs.column("gradients") == gradients and -1 < min(cosines) < 1


SCRIPTS = {  # what makes a script smaller than --quick, and what it finds
    "learning_rates": ("", fastest_circles_less_with_stable_sam),
    "two_minima": ("", sam_ends_flatter),
    "mnist_1000": ("--data {}", validation_chooses_and_new_seeds_test),
    "norms": ("--seeds 1", lambda runs: runs[0]["ratio"][-1] > runs[2]["ratio"][-1]),
    "one_example": ("--seeds 1", lambda runs: 0 < runs[0]["distance"][1] < 0.01),
    "friendly": ("--seeds 1", lambda runs: runs.values("rho") == [None, 0.05]),
    "m_sharpness": ("--seeds 1 --ms 16", lambda runs: runs.values("noise") == [0, 40]),
    "gsam": ("--seeds 1", gap_estimates_the_curvature),
    "one_gradient": ("--data {} --tasks mnist text", momentum_sam_takes_one_gradient),
    "msam_radius": ("", lambda runs: len(runs.of(method="sam")) == 5 < len(runs) == 21),
    "which_method": ("--settings 1", look_sam_ascends_on_4_of_20_steps),
    "cifar10": ("--data {}", lambda runs: runs.column("gradients") == [1, 2]),
}


FAST = ("two_minima", "m_sharpness")  # one without a network, and one with
TINY_RUNS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in SCRIPTS
]


@pytest.mark.parametrize("name", TINY_RUNS)
def test_a_tiny_run(name, directory, tmp_path, capsys):
    smaller, is_right = SCRIPTS[name]
    argv = ["--quick", *smaller.format(directory).split(), "--output", str(tmp_path)]
    experiment(name).main(argv)
    assert "|--" in capsys.readouterr().out  # a table
    assert imread(tmp_path / f"{name}.png").std() > 0.05
    report = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert is_right(harness.Runs(report["runs"]))


def test_the_figure_of_one_gradient_draws_every_panel(tmp_path):
    for file in ("which_method", "one_gradient"):
        runs = [
            {"on": "test", "task": task, "noise": noise, "seed": seed}
            | {"method": method, "gradients": gradients, "test": 90 + seed + gradients}
            for of, task, noise in one_gradient_figure.PANELS.values()
            for method, gradients in (("sam", 2), ("msam_0.9", 1), ("other", 1.2))
            for seed in range(2)
            if of == file
        ]
        (tmp_path / f"{file}.json").write_text(json.dumps({"runs": runs}))
    one_gradient_figure.main(tmp_path, tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")[..., :3]
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    for part in (picture[:height], picture[height:]):
        for panel in (part[:, :width], part[:, width:]):
            blue = (panel[..., 2] > 0.6) & (panel[..., 0] < 0.3)
            assert blue.sum() > 50  # of momentum-SAM


@pytest.mark.parametrize(
    "name, argv, complaint",
    [
        ("norms", "--seeds 0", "'0'"),
        ("one_example", "--schedules linear", "'linear'"),
        ("mnist_1000", "", "--data"),
        ("mnist_1000", "--data . --gradients 199", "200"),
        ("which_method", "--data empty", "t10k-images-idx3-ubyte"),
        ("cifar10", "--noise 0 101", "'101'"),
    ],
)
def test_bad_input_is_one_line(name, argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        experiment(name).main(argv.split())
    printed = capsys.readouterr()
    assert (exit.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert complaint in printed.err


# --- The harness ----------------------------------------------------------------------


class Slow(harness.Experiment):
    """Trainings that only take time: 30 s each, after which a second one is known."""

    same = ("epochs",)
    options = harness.arguments(seeds=(3, 1, "trainings"), epochs=(3, 1, "passes"))
    clock = types.SimpleNamespace(now=0.0)

    def plan(self):
        return harness.cases(seed=range(self.args.seeds))

    def measure(self, seed):
        self.claim(30)
        self.clock.now += 30
        return {"number": float(seed)}

    def report(self):
        self.pivot("title", {"all": self.runs}, "number", "seed")


def test_a_budget_ends_before_what_does_not_fit_and_resume_goes_on(
    tmp_path, monkeypatch, capsys
):
    def run(*argv):
        Slow.clock.now = 0.0
        Slow.main([*argv, "--output", str(tmp_path)])
        report = json.loads((tmp_path / "test_papers.json").read_text(encoding="utf-8"))
        return [run["seed"] for run in report["runs"]], Slow.clock.now

    monkeypatch.setattr(harness.time, "perf_counter", lambda: Slow.clock.now)
    assert run("--budget", "60") == ([0], 30)
    assert "--resume goes on" in capsys.readouterr().out
    assert run("--resume", "--budget", "61") == ([0, 1, 2], 60)
    assert run("--resume", "--seeds", "1") == ([0, 1, 2], 0)
    assert run("--seeds", "2") == ([0, 1], 60)
    with pytest.raises(SystemExit):
        run("--resume", "--epochs", "4")
    assert "is of --epochs 3, not of 4" in capsys.readouterr().err


def test_statistics():
    first, second = np.random.default_rng(0).normal(size=(2, 6))
    pairs = harness.compare_pairs(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert pairs.mean - pairs.half_width == pytest.approx(interval.low)
    assert pairs.mean + pairs.half_width == pytest.approx(interval.high)
    assert pairs.larger == np.sum(first > second)
    assert harness.describe([1.0, 2.0]) == "1.5 ± 0.7"
    rows = [("a", 1, 0, 90.0), ("a", 1, 1, 91.0), ("a", 2, 0, 80.0), ("b", 1, 1, 90.5)]
    keys = ("method", "rho", "seed", "test")
    runs = harness.Runs(dict(zip(keys, row, strict=True)) for row in rows)
    assert runs.best("test", "method", "rho").column("test") == [90, 91]
    assert runs.best("test", "method", "rho", sign=-1).column("test") == [80]
    less = runs.of(method="a", rho=1).less(runs.of(method="b"), "test")
    assert less.show() == "+0.5"  # on the one seed that both have


def test_the_data_of_the_trainings():
    other = friendly.others(jax.random.key(1), jnp.arange(6), jnp.zeros((30, 4)), 24)
    assert sorted(other.tolist()) == list(range(6, 30))
    first, second, _ = one_example.two_sets(*loaders.load_digits(), 100, seed=0)
    assert np.any(first[0] != second[0], axis=1).sum() == 1
    digits = loaders.load_digits()
    clean, noisy = (loaders.split(*digits, (700,), 0, noise) for noise in (0, 40))
    assert np.mean(clean[0][1] != noisy[0][1]) == pytest.approx(0.36, abs=0.04)
    np.testing.assert_array_equal(clean[1][1], noisy[1][1])
    labels = np.full(5000, 10, np.int32)  # of no class, so that every change shows
    assert np.bincount(cifar10.add_noise(labels, 60, seed=0))[10] == 2000
    for entry in which_method.ENTRIES.values():
        assert len({tuple(setting.items()) for setting in entry.settings()}) == 8
