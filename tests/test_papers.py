"""The scripts of benchmarks/papers run and measure right, and so does their harness."""

import functools
import importlib
import json
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread
from scipy import stats

import cifar10
import friendly
import harness
import language_model
import loaders
import newer_methods
import one_example
import one_gradient_figure
import resnet
import small_resnet
import which_method
import which_method_figure
from sam_optax import sharpness


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


def every_method_has_its_measures(runs):
    calibrated = runs.of(on="test", method="bsam")[0]
    rare = runs.of(on="test", part="rare").values("method")
    is_wider = calibrated["norm_nearby"] > calibrated["norm"] > 0
    known = is_wider and calibrated["mean_nll"] != calibrated["nll"] > 0
    return known and rare == ["sgd", "sam", "imb_sam", "focal_sam"]


def rounding_to_few_bits_costs_more(runs):
    eight, three = (
        np.abs(np.subtract(runs.column(f"test_{bits}_bits"), runs.column("test")))
        for bits in (8, 3)
    )
    own = np.not_equal(runs.column("own_test"), runs.column("fine_test"))
    trained = runs.column("method"), runs.column("gradients"), own.tolist()
    expected = ["adamw", "sam", "msam"], [1, 2, 1], [False, True, True]
    return (eight < three).all() and max(eight) < 0.01 and trained == expected


def late_sam_ascends_in_the_second_half(runs):
    tests = runs.of(on="test")
    rates = runs.values("learning_rate")
    return tests.column("gradients") == [1, 2, 1.5] and rates == [0.05]


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
    "newer_methods": ("--settings 1", every_method_has_its_measures),
    "language_model": ("", rounding_to_few_bits_costs_more),
    "small_resnet": (
        "--data {} --methods late_sam --settings 1",
        late_sam_ascends_in_the_second_half,
    ),
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


def runs_for_figures(methods):
    """Of method -> gradients, accuracy; with times in proportion to the gradients."""
    seeds = harness.cases(
        task=["digits", "mnist", "cifar"], noise=[0, 40], seed=range(3)
    )
    runs = [
        case
        | {"on": "test", "method": method, "gradients": gradients}
        | {"test": accuracy + 0.1 * case["seed"] + (case["task"] == "mnist")}
        for case in seeds
        for method, (gradients, accuracy) in methods.items()
    ]
    stretch = {name: which_method.ENTRIES[name].stretch for name in methods}
    runs += [
        case | {"on": "time", "seconds": 2 * methods[case["method"]][0]}
        for case in harness.cases(
            task=["digits", "mnist"], method=methods, round=[0, 1]
        )
    ]
    for run in runs:
        run["seconds"] = run.get("seconds", 0) / stretch[run["method"]]
    return harness.Runs(runs)


COMPARED = {
    **{"sgd": (1, 90), "sgd_twice": (2, 90.1), "sam": (2, 93), "msam_0.9": (1.1, 93.2)},
    **{"asam": (2, 93.1), "fsam": (2.1, 94), "sgd_decay": (1, 92), "k_sam": (1.3, 80)},
}


def check_labels(panels):
    """Inside of their axes, and no two that overlap."""
    for labels in panels:
        boxes = [label.get_window_extent() for label in labels]
        for corner in (corner for box in boxes for corner in (box.min, box.max)):
            assert labels[0].axes.bbox.contains(*corner)
        assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


def test_the_figure_of_all_methods_names_what_matters():
    runs = runs_for_figures(COMPARED)
    assert which_method.relative_time(runs, "k_sam", "mnist") == pytest.approx(1.3)
    assert which_method.relative_time(runs, "sgd_twice", "digits") == pytest.approx(2)
    _, panels = which_method_figure.draw(runs)
    named = {"SGD", "SGD, twice the steps", "SGD, weight decay tuned", "SAM"}
    named |= {"momentum-SAM", "fsam", "k_sam: 80 %"}  # not asam, which msam_0.9 beats
    assert {label.get_text() for label in panels[0]} == named
    assert {label.get_text() for label in panels[3]} == named - {"k_sam: 80 %"} | {
        "k_sam: 81 %"
    }
    check_labels(panels)


def test_the_figure_of_one_gradient_draws_the_panels_that_are_there(tmp_path):
    runs = runs_for_figures(COMPARED)
    (tmp_path / "which_method.json").write_text(json.dumps({"runs": runs}))
    for count, kept in (
        (5, runs),
        (
            4,
            [r for r in runs if r["task"] != "cifar"]
            + [r for r in runs if r["task"] == "cifar" and r.get("noise") == 0],
        ),
    ):
        (tmp_path / "one_gradient.json").write_text(json.dumps({"runs": kept}))
        figure, panels = one_gradient_figure.draw(tmp_path)
        assert len(panels) == count
        check_labels(panels)
        dots = [axes.lines[0].get_xdata()[0] for axes in figure.axes]
        assert dots == [1.1] * count  # of momentum-SAM, by time and by gradients
    one_gradient_figure.main(tmp_path, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").std() > 0.05


@pytest.mark.parametrize(
    "name, argv, complaint",
    [
        ("norms", "--seeds 0", "'0'"),
        ("one_example", "--schedules linear", "'linear'"),
        ("mnist_1000", "", "--data"),
        ("mnist_1000", "--data . --gradients 199", "200"),
        ("which_method", "--data empty", "t10k-images-idx3-ubyte"),
        ("cifar10", "--noise 0 101", "'101'"),
        ("one_gradient", "--tasks mnist text", "need --data"),
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
    with pytest.raises(SystemExit):
        run("--seeds", "2")
    assert "has 3 runs. --resume goes on from them" in capsys.readouterr().err
    assert run("--overwrite", "--seeds", "2") == ([0, 1], 60)
    with pytest.raises(SystemExit):
        run("--resume", "--epochs", "4")
    assert "is of --epochs 3, not of 4" in capsys.readouterr().err


def test_runs_that_may_be_lost_and_those_that_are_not_there(tmp_path, capsys):
    argv = ["--output", str(tmp_path)]
    Slow.main([*argv, "--resume", "--quick"])
    assert "There is no" in capsys.readouterr().out
    Slow.main(argv)  # over runs of --quick, which are of seconds
    path = tmp_path / "test_papers.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    assert len(report["runs"]) == 3 and report["earlier_versions"] == []
    path.write_text('{"runs": [', encoding="utf-8")
    with pytest.raises(SystemExit):
        Slow.main([*argv, "--resume"])
    assert "is damaged" in capsys.readouterr().err


def test_runs_of_other_versions_are_kept_and_named(tmp_path, capsys):
    argv, path = ["--output", str(tmp_path)], tmp_path / "test_papers.json"
    Slow.main([*argv, "--seeds", "1"])
    report = json.loads(path.read_text(encoding="utf-8"))
    now, then = report["versions"], report["versions"] | {"jax": "0.1.2"}
    path.write_text(json.dumps(report | {"versions": then}), encoding="utf-8")
    Slow.main([*argv, "--resume"])
    assert "The runs so far are of jax 0.1.2; they are kept." in capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert (report["versions"], report["earlier_versions"]) == (now, [then])
    assert len(report["runs"]) == 3


def test_a_resumed_run_remembers_all_versions(tmp_path, monkeypatch):
    for version in "ABC":
        monkeypatch.setattr(harness, "versions", lambda v=version: {"jax": v})
        argv = ["--output", str(tmp_path), "--seeds", str("ABC".index(version) + 1)]
        Slow.main([*argv, "--resume"])
    text = (tmp_path / "test_papers.json").read_text(encoding="utf-8")
    assert json.loads(text)["earlier_versions"] == [{"jax": "A"}, {"jax": "B"}]


def test_where_trainings_fail_the_smallest_radius_comes_first():
    entry = small_resnet.ENTRIES["sam"]

    def best(**accuracies):
        runs = [{"rho": float(k[1:]), "validation": v} for k, v in accuracies.items()]
        return max(runs, key=lambda run: small_resnet.rank(entry, run))["rho"]

    assert best(r2=9.8, r1=9.3, r4=14.9) == 1
    assert best(r2=16.0, r1=14.0) == 2
    assert best(r2=40.0, r1=41.0, r4=40.5) == 1


def test_at_a_given_learning_rate_only_what_was_tried_there_is_reported(
    directory, tmp_path, monkeypatch, capsys
):
    numbers = dict.fromkeys(["gradients", "seconds", "train", "validation"], 1.0)
    numbers |= dict.fromkeys(["highest", "wrong_learned", "eigenvalue", "trace"], 1.0)
    curves = {name: [1.0, 2.0] for name in small_resnet.CURVES}

    def measure(self, learning_rate, **case):
        return numbers | {"test": 100 * learning_rate, "curves": curves}

    monkeypatch.setattr(small_resnet.SmallResNet, "measure", measure)
    argv = ["--quick", "--data", str(directory), "--output", str(tmp_path), "--resume"]
    small_resnet.SmallResNet.main([*argv, "--methods", "asam"])
    assert "40 % wrong" in capsys.readouterr().out
    argv += ["--noises", "0", "--learning-rate", "0.3", "--methods"]
    small_resnet.SmallResNet.main([*argv, "sam"])
    printed = capsys.readouterr().out
    assert "0 % wrong" in printed
    assert "40 % wrong" not in printed
    table = printed.split("0 % wrong", 1)[1].split("chooses", 1)[0]
    assert "30.0" in table
    assert "asam" not in table


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def measure(self, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return {"number": float(seed)}

    monkeypatch.setattr(Slow, "measure", measure)
    with pytest.raises(SystemExit, match="Stopped in seed 2; --resume goes on"):
        Slow.main(["--output", str(tmp_path)])
    text = (tmp_path / "test_papers.json").read_text(encoding="utf-8")
    assert [run["seed"] for run in json.loads(text)["runs"]] == [0, 1]


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


def test_the_measures_of_newer_methods():
    x, y = np.ones((4, 64), np.float32), np.array([0, 1, 1, 3])
    sure = np.full((4, 10), 0.05 / 9)
    sure[:, 1] = 0.95  # right on two of four
    found = newer_methods.calibration(sure, y)
    assert found["test"] == 50
    assert found["ece"] == pytest.approx(45)  # 95 % sure, 50 % right
    assert found["nll"] == pytest.approx(-(np.log(0.95) + np.log(0.05 / 9)) / 2)
    (train, labels), (_, others), _ = newer_methods.rare_digits(seed=1)
    assert tuple(np.bincount(labels)) == newer_methods.COUNTS
    assert newer_methods.COUNTS[0] == 50 and newer_methods.COUNTS[-1] == 2
    originals = loaders.split(*loaders.load_digits(), (700, 300), seed=1)
    assert len(train) == sum(newer_methods.COUNTS)
    pairs = set(zip(originals[1][1].tolist(), others.tolist(), strict=True))
    assert len(pairs) == 10  # the same order in every part
    params = newer_methods.MODEL.init(jax.random.key(0), x)
    near = newer_methods.largest_norm_nearby(params, x, y)
    moved = jax.tree.map(jnp.subtract, near, params)
    distance = optax.tree.norm(moved)
    assert distance == pytest.approx(newer_methods.NEAR, rel=1e-4)
    norms = [
        sharpness.gradient_norm(newer_methods.mean_loss, at, (x, y))
        for at in (params, near)
    ]
    assert norms[1] > norms[0]


def test_matrices_are_rounded_to_few_bits_with_a_scale_for_each_output():
    kernel = jnp.array([[0.9, -0.3, 0.0], [0.4, 0.16, 0.0]])
    params = {"Dense_0": {"kernel": kernel, "bias": kernel[1]}, "place": kernel}
    found = language_model.round_kernels(params, bits=3)  # 3 steps on either side
    expected = [[0.9, -0.3, 0], [0.3, 0.2, 0]]
    np.testing.assert_allclose(found["Dense_0"]["kernel"], expected, atol=1e-6)
    found["Dense_0"]["kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_convolution_as_a_product_of_matrices():
    image_key, kernel_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(image_key, (2, 9, 10, 3))
    kernel = jax.random.normal(kernel_key, (3, 2, 3, 4))

    def squares(convolve, x, kernel):
        layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        out = convolve(x, kernel, (2, 3), ((1, 1), (0, 2)), **layout)
        return jnp.sum(out**2), out

    slopes = jax.grad(squares, argnums=(1, 2), has_aux=True)
    expected = slopes(jax.lax.conv_general_dilated, x, kernel)
    found = slopes(resnet.convolve_by_matmul, x, kernel)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected
    )


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
