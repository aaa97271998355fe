"""The scripts of benchmarks/papers run, write what they should, and measure right."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread
from scipy import stats

import evidence
import friendly
import gsam
import loaders
import norms
import one_example
import sam_optax
import training
import which_method
from lab import assert_trees_close, assert_trees_equal

SCRIPTS = ["learning_rates", "two_minima", "mnist_1000", "norms", "one_example"]
SCRIPTS += ["friendly", "m_sharpness", "gsam", "which_method"]


def write_like_mnist(directory):
    """Digits of scikit-learn, enlarged and repeated until there are enough."""
    images, labels = loaders.load_digits()
    images = np.pad(np.kron(15 * images, np.ones((1, 3, 3), np.uint8)), 2)[2:-2]
    which = np.arange(2200) % len(images)
    path = directory / "mnist_t10k.npz"
    np.savez(path, image=images[which], label=labels[which])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a script's --quick writes, run once: name -> the JSON."""
    directory = tmp_path_factory.mktemp("papers")
    write_like_mnist(directory)
    reports = {}

    def get(name):
        if name not in reports:
            argv = ["--quick", "--output", str(directory)]
            argv += ["--data", str(directory)] if name == "mnist_1000" else []
            assert importlib.import_module(name).main(argv) == 0
            text = (directory / f"{name}.json").read_text(encoding="utf-8")
            reports[name] = json.loads(text)
            assert imread(directory / f"{name}.png").std() > 0.05  # not of one colour
        return reports[name]

    return get


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_says_how_it_was_made(report, name, capsys):
    found = report(name)
    assert found["versions"]["sam_optax"] == sam_optax.__version__
    assert found["settings"]["quick"]
    assert found["runs"]
    assert found["seconds"] > 0
    assert "|--" in capsys.readouterr().out  # a table


def of(runs, **wanted):
    return [run for run in runs if all(run[k] == v for k, v in wanted.items())]


def test_stable_sam_reaches_minima_where_sam_circles_them(report):
    runs = report("learning_rates")["runs"]
    assert len(runs) == 5 * (1 + 2 * 3)
    fastest = [run for run in runs if run["learning_rate"] == pytest.approx(0.3)]
    (gd,) = of(fastest, method="GD")
    (sam,) = of(fastest, method="SAM", rho=0.5)
    (stable,) = of(fastest, method="StableSAM", rho=0.5)
    assert gd["near_percent"] == 100
    assert sam["near_percent"] < 1
    assert sam["around_percent"] > 40
    assert 60 < stable["near_percent"] < 75


def test_sam_ends_flatter_and_by_how_much_depends_on_rho(report):
    runs = of(report("two_minima")["runs"], function="valley")
    mean = {run["rho"]: np.array(run["eigenvalues"]) for run in runs}
    assert np.mean(mean[1e-5] < mean[0.0]) > 0.95
    assert np.abs(mean[1e-5] - mean[0.0]).max() < 1e-3
    assert mean[0.0].mean() > 2
    assert mean[0.1].mean() < 0.05
    assert max(runs[0]["losses"]) < 1e-4


def test_gd_passes_the_sharp_minimum_and_sam_may_not(report):
    runs = of(report("two_minima")["runs"], function="two minima")
    assert {run["flat_percent"] for run in of(runs, rho=0.0)} == {100.0}
    slowest = min(run["learning_rate"] for run in runs)
    (sam,) = of(runs, rho=0.03, learning_rate=slowest)
    assert sam["flat_percent"] == 0


def test_each_method_chooses_by_validation_and_is_tested_on_new_seeds(report):
    runs = report("mnist_1000")["runs"]
    for method in ("SGD", "SAM"):
        tuning = of(runs, method=method, on="validation")
        tests = of(runs, method=method, on="test")
        assert (len(tuning), len(tests)) == (2, 1)
        best = min(tuning, key=lambda run: run["loss"])
        for run in tests:
            assert run["learning_rate"] == best["learning_rate"]
            assert run["rho"] == best["rho"]
            assert run["seed"] not in [other["seed"] for other in tuning]
            assert run["gap"] == pytest.approx(run["loss"] - run["train_loss"])
            assert run["gradients"] == 200
            assert len(run["curve"]["loss"]) == len(run["curve"]["gradients"])


def test_the_whole_batch_is_m_sharpness_of_one_group(report):
    runs = report("m_sharpness")["runs"]
    assert {(run["m"], run["noise"]) for run in runs} == {
        (m, noise) for m in (64, 16) for noise in (0, 40)
    }
    whole, parts = (of(runs, m=m, noise=0, seed=0)[0] for m in (64, 16))
    assert whole["validation_percent"] != parts["validation_percent"]


def test_gsam_is_measured_by_its_gap_and_its_eigenvalue(report):
    runs = report("gsam")["runs"]
    found = {(run["method"], run["rho"], run["weight"]) for run in runs}
    assert found == {
        ("gsam", 0.1, 0),
        ("gsam", 0.1, 0.1),
        ("sam_plus_gap", 0.1, 0.1),
    }
    assert len(runs) == len(found) * 2 * 2  # shares of wrong labels, seeds
    for run in runs:
        assert len(run["gaps"]) == 2
        assert min(run["gaps"]) > 0
        assert run["estimate"] == pytest.approx(2 * run["gap"] / run["rho"] ** 2)
        assert run["worst_estimate"] > 0.999 * run["estimate"]
        assert run["eigenvalue"] > 0
        assert all(-1 <= cosine <= 1 for cosine in run["cosine"])


def test_gsam_is_compared_with_the_sum_of_both_losses():
    w, x, y = linear_problem()
    g = jax.grad(loss_fn)(w, x, y)
    perturbation = 0.3 * g / jnp.linalg.norm(g)

    def both(w):
        perturbed = loss_fn(w + perturbation, x, y)
        return perturbed + 0.7 * (perturbed - loss_fn(w, x, y))

    options = {"rho": 0.3, "lam": 0.7}
    init, step = training.make_step(loss_fn, "sam_plus_gap", optax.sgd(0.1), **options)
    found, *_ = jax.jit(step)(w, init(w), x, y)
    assert_trees_close(found, w - 0.1 * jax.grad(both)(w), rtol=1e-5)


def test_the_chosen_weight_is_that_of_the_best_validation():
    def runs(method, weight, validation):
        setting = {"method": method, "rho": 0.1, "weight": weight, "noise": 40}
        return [{**setting, "validation_percent": v} for v in validation]

    everything = runs("gsam", 0, (99, 99)) + runs("gsam", 0.1, (80, 90))
    everything += runs("gsam", 0.2, (95, 70)) + runs("sam_plus_gap", 0.4, (60, 61))
    groups = gsam.chosen(everything, 40)
    assert [group[0]["weight"] for group in groups.values()] == [0, 0.1, 0.4]


def test_each_line_of_which_method_has_the_same_budget():
    assert set(sam_optax.METHODS) < set(which_method.ENTRIES)
    for name, entry in which_method.ENTRIES.items():
        settings = entry.settings()
        assert len(settings) == len({tuple(s.items()) for s in settings}) == 8, name
        count = sam_optax.METHODS.get(name, sam_optax.METHODS["sam"]).gradients
        if count.isdecimal() and entry.rule is None:
            assert entry.passes == int(count), name


def test_which_method_counts_the_gradients_that_were_taken(report):
    trained = [r for r in report("which_method")["runs"] if r["on"] != "time"]
    # Two epochs of 10 steps; LookSAM ascends on 4 of them.
    expected = {"sgd": 1, "sgd_twice": 2, "sam": 2, "look_sam": 1.2}
    for method, gradients in expected.items():
        found = [run["gradients"] for run in trained if run["method"] == method]
        assert found == pytest.approx([gradients] * len(found)), method


def test_which_method_chooses_by_validation_and_is_tested_on_new_seeds(report):
    runs = [r for r in report("which_method")["runs"] if r["on"] != "time"]
    for method in ("sgd", "sgd_twice", "sam", "look_sam"):
        for noise in (0, 40):
            mine = of(runs, method=method, noise=noise)
            tuning, tests = of(mine, on="validation"), of(mine, on="test")
            assert (len(tuning), len(tests)) == (2, 2)
            best = max(tuning, key=lambda run: run["validation"])
            for run in tests:
                assert run["learning_rate"] == best["learning_rate"]
                assert run["rho"] == best["rho"]
                assert run["seed"] not in [other["seed"] for other in tuning]


def test_which_method_marks_choices_at_the_edge_and_clear_differences():
    def runs(method, rho, accuracies, on="test"):
        shared = {"method": method, "task": "digits", "noise": 0, "on": on, "rho": rho}
        return [{**shared, "test": accuracy} for accuracy in accuracies]

    tests = runs("sgd", None, (90, 92, 91)) + runs("sam", 0.2, (93, 95.1, 94))
    tests += runs("fsam", 0.1, (93, 95, 94.1))
    tuning = [
        run
        for name in ("sam", "fsam")
        for rho in (0.1, 0.2, 0.3)
        for run in runs(name, rho, (0,), on="validation")
    ]
    everything = tests + tuning
    edges = [which_method.edge(everything, run, "rho") for run in (tests[3], tests[6])]
    assert edges == ["", "*"]
    case = {"task": "digits", "noise": 0}
    assert which_method.is_clear(which_method.less(tests, "sam", "sgd", **case))
    assert not which_method.is_clear(which_method.less(tests, "fsam", "sam", **case))


def test_which_method_compares_times_of_the_same_round():
    seconds = {"sgd": (1.0, 3.0, 1.0), "sgd_twice": (1.0, 3.0, 1.1), "sam": (2, 6.3, 9)}
    runs = [
        {"on": "time", "method": method, "task": "digits", "seconds": s}
        for method, rounds in seconds.items()
        for s in rounds
    ]
    ratios = [which_method.time_ratio(runs, name, "digits") for name in seconds]
    assert ratios == pytest.approx([1, 2, 2.1])


def test_a_step_sees_the_examples_that_its_rule_chooses():
    w, x, y = linear_problem()

    def losses(w, x, y):
        return (x @ w - y) ** 2

    ends = []
    for rule in (None, sam_optax.k_sam(30), sam_optax.k_sam(10)):
        options = {"batch_argnums": (1, 2), "data": rule, "rho": 0.1}
        init, step = training.make_step(losses, "sam", optax.sgd(0.1), **options)
        ends.append(step(w, init(w), x, y)[0])
    whole, every, some = ends
    assert_trees_close(whole, every, rtol=1e-5)
    assert jnp.abs(some - whole).max() > 0.01


def test_norms_are_of_one_geometry(report):
    runs = report("norms")["runs"]
    for run in runs:
        ratio, product = np.array(run["ratio"]), np.array(run["product_over_square"])
        assert np.all(ratio[-2:] < 1)
        assert np.all(product[-2:] > 1)
    ratios = {run["rho"]: run["ratio"][-1] for run in runs}
    assert ratios[0.01] > ratios[0.05] > ratios[0.2]


def test_lenet_sees_rows_as_images():
    lenet = norms.LeNet()
    rows = jnp.zeros((5, 64))
    params = jax.eval_shape(lenet.init, jax.random.key(0), rows)
    kernels = [params["params"][f"Conv_{i}"]["kernel"].shape for i in (0, 1)]
    assert kernels == [(3, 3, 1, 6), (3, 3, 6, 16)]
    assert jax.eval_shape(lenet.apply, params, rows).shape == (5, 10)


def test_the_distance_is_of_the_one_example(report):
    for run in report("one_example")["runs"]:
        assert 0 < run["distance"][0] < run["distance"][1] < 0.01
    first, second, test = one_example.two_sets(*loaders.load_digits(), 100, seed=0)
    rows = np.flatnonzero(np.any(first[0] != second[0], axis=1))
    assert len(rows) == 1
    assert len(test[0]) == 1797 - 101


def test_friendly_has_every_radius_noise_and_seed(report):
    runs = report("friendly")["runs"]
    found = {(run["variant"], run["noise_percent"], run["seed"]) for run in runs}
    assert len(found) == len(runs) == 3 * 2 * 2
    assert friendly.choice(runs, "sam", 0) == {"learning_rate": 0.05, "rho": 0.05}


def test_noise_replaces_training_labels_only():
    clean, noisy = friendly.make_data(0, 0), friendly.make_data(0, 40)
    for a, b in zip(clean[1:], noisy[1:], strict=True):
        assert_trees_equal(a, b)
    assert np.mean(clean[0][1] != noisy[0][1]) == pytest.approx(0.36, abs=0.04)


def linear_problem():
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (30, 4)), jax.random.normal(keys[1], (30,))
    return jax.random.normal(keys[2], (4,)), x, y


def loss_fn(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


def test_other_batches_leave_out_or_contain_the_batch():
    w, x, y = linear_problem()
    index = jnp.arange(3, 9)
    arguments = (loss_fn, w, jax.random.key(1), index, x, y)
    other = friendly.others(jax.random.key(1), index, x, 24)
    assert sorted([*other.tolist(), *index.tolist()]) == list(range(30))
    other_x, other_y = friendly.another_batch(*arguments)["ascent_batch"]
    assert len(other_x) == len(other_y) == 6
    larger_x, _ = friendly.larger_batch(3)(*arguments)["ascent_batch"]
    np.testing.assert_array_equal(larger_x[:6], x[index])
    assert len(np.unique(larger_x, axis=0)) == 18


def test_sam_full_ascends_as_sam_does_on_all_examples():
    w, x, y = linear_problem()
    index = jnp.arange(6)
    arguments = (loss_fn, w, jax.random.key(1), index, x, y)
    ends = []
    for method, more in (
        ("sam_full", friendly.full_gradient(*arguments)),
        ("sam", friendly.larger_batch(5)(*arguments)),
    ):
        options = {"batch_argnums": (1, 2), "rho": 0.1}
        init, step = training.make_step(loss_fn, method, optax.sgd(0.1), **options)
        step = jax.jit(step)
        ends.append(step(w, init(w), x[index], y[index], **more)[0])
    assert_trees_close(*ends, rtol=1e-5)


def test_plain_is_the_base_optimizer():
    w, x, y = linear_problem()
    init, step = training.make_step(loss_fn, training.PLAIN, optax.sgd(0.1))
    found, _, loss, report = step(w, init(w), x, y)
    value, gradient = jax.value_and_grad(loss_fn)(w, x, y)
    assert_trees_close(found, w - 0.1 * gradient, rtol=1e-6)
    assert loss == pytest.approx(value)
    assert report.ascended == 0


def test_pairs_are_compared_as_student_does():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 6))
    pairs = evidence.compare_pairs(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert pairs.mean - pairs.half_width == pytest.approx(interval.low)
    assert pairs.mean + pairs.half_width == pytest.approx(interval.high)
    assert pairs.larger == np.sum(first > second)
    assert evidence.describe([1.0, 2.0]) == "1.5 ± 0.7"
    assert evidence.describe([1.25], 2) == "1.25"


@pytest.mark.parametrize(
    "name, argv, complaint",
    [
        ("norms", ["--seeds", "0"], "'0'"),
        ("norms", ["--output", "file"], "file"),
        ("one_example", ["--schedules", "linear"], "'linear'"),
        ("one_example", ["--data", "empty"], "t10k-images-idx3-ubyte"),
        ("mnist_1000", [], "--data"),
        ("which_method", ["--data", "empty"], "t10k-images-idx3-ubyte"),
        ("mnist_1000", ["--gradients", "199"], "200"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(name, argv, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(name).main(argv)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert complaint in printed.err
