"""The scripts of benchmarks/papers run, write what they should, and measure right."""

import argparse
import importlib
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

import cifar10
import evidence
import friendly
import gsam
import loaders
import norms
import one_example
import resnet
import sam_optax
import training
import which_method
from lab import assert_trees_close, assert_trees_equal

SCRIPTS = ["learning_rates", "two_minima", "mnist_1000", "norms", "one_example"]
SCRIPTS += ["friendly", "m_sharpness", "gsam", "which_method", "cifar10"]
WITH_DATA = ["mnist_1000", "cifar10"]


def write_like_mnist(directory):
    """Digits of scikit-learn, enlarged and repeated until there are enough."""
    images, labels = loaders.load_digits()
    images = np.pad(np.kron(15 * images, np.ones((1, 3, 3), np.uint8)), 2)[2:-2]
    which = np.arange(2200) % len(images)
    path = directory / "mnist_t10k.npz"
    np.savez(path, image=images[which], label=labels[which])


def write_like_cifar(directory):
    """Random images, 16 in each file of the binary version, sorted by class."""
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = rng.integers(0, 256, (16, 1 + 3072), np.uint8)
        records[:, 0] = np.arange(16) * 10 // 16
        (directory / f"{name}.bin").write_bytes(records.tobytes())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a script's --quick writes, run once: name -> the JSON."""
    directory = tmp_path_factory.mktemp("papers")
    write_like_mnist(directory)
    write_like_cifar(directory)
    reports = {}

    def get(name):
        if name not in reports:
            argv = ["--quick", "--output", str(directory)]
            argv += ["--data", str(directory)] if name in WITH_DATA else []
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


# --- CIFAR-10 -------------------------------------------------------------------------


def test_cifar10_measures_each_training(report):
    runs = report("cifar10")["runs"]
    found = [(run["noise_percent"], run["method"]) for run in runs]
    assert found == [(60, "SGD"), (60, "SAM")]
    for run in runs:
        assert run["finished"]
        assert run["gradients"] == (2 if run["method"] == "SAM" else 1)
        assert run["eigenvalue"] > 10 * run["eigenvalue_residual"]
        assert run["images_per_second"] * run["seconds_per_epoch"] == pytest.approx(64)
        assert all(len(curve) == 2 for curve in run["curves"].values())
        assert run["test_percent"] == run["curves"]["test_percent"][-1]


def cifar_settings(tmp_path, **settings):
    defaults = {"output": tmp_path, "epochs": 2, "seeds": 2, "noise": [0, 60]}
    defaults |= {"methods": ["SGD", "SAM"], "resume": True, "budget": None}
    defaults |= dict.fromkeys(cifar10.SAME, 2)
    return argparse.Namespace(**defaults | settings)


class FakeLab:
    """Trainings that only take time: an epoch 10 s, the measures at the end 5 s."""

    def __init__(self, clock):
        self.clock, self.trained = clock, []

    def labels(self, noise, seed):
        return noise, seed

    def start(self, name, seed):
        return (name,)

    def train_epoch(self, name, state, seed, epoch, labels):
        self.clock.now += 10
        self.trained.append((*labels, name, epoch))
        values = dict.fromkeys(cifar10.CURVES, 1.0)
        return (*state, epoch), values | {"seconds": 10.0}

    def measure(self, state, labels):
        self.clock.now += 5
        return {"measured": list(state)}

    def summarize(self, name, curves):
        return {}


@pytest.fixture
def fake_lab(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    lab = FakeLab(clock)
    monkeypatch.setattr(cifar10, "Lab", lambda args, data: lab)
    monkeypatch.setattr(cifar10.time, "perf_counter", lambda: clock.now)
    return lab


def run_cifar10(args):
    runs = cifar10.finished_runs(args)
    budget = cifar10.Budget(args.budget)
    return cifar10.run_all(args, Console(quiet=True), None, runs, budget)


def test_every_method_has_its_first_seed_before_any_has_its_second(fake_lab, tmp_path):
    runs = run_cifar10(cifar_settings(tmp_path))
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    assert fake_lab.trained[:3] == [
        (0, 0, "SGD", 0),
        (0, 0, "SGD", 1),
        (0, 0, "SAM", 0),
    ]
    assert runs[1]["measured"] == ["SAM", 0, 1]


@pytest.mark.parametrize(
    "budget, epochs", [(30, 2), (31, 3), (41, 4), (105, 6), (106, 9)]
)
def test_the_budget_ends_before_what_does_not_fit(budget, epochs, fake_lab, tmp_path):
    """From its second epoch on, it is known how long a method takes."""
    run_cifar10(cifar_settings(tmp_path, budget=budget, epochs=3))
    assert len(fake_lab.trained) == epochs
    saved = json.loads((tmp_path / "cifar10.json").read_text(encoding="utf-8"))["runs"]
    assert sum(len(run["curves"]["loss"]) for run in saved) == epochs
    assert [run["finished"] for run in saved].count(True) == epochs // 3


def test_resume_makes_what_is_missing_and_keeps_the_rest(fake_lab, tmp_path):
    first = run_cifar10(cifar_settings(tmp_path, budget=40))
    assert [run["finished"] for run in first] == [True, False]
    fake_lab.trained.clear()
    assert len(run_cifar10(cifar_settings(tmp_path))) == 8
    assert len(fake_lab.trained) == 2 * 7
    assert fake_lab.trained[:2] == [(0, 0, "SAM", 0), (0, 0, "SAM", 1)]
    assert len(run_cifar10(cifar_settings(tmp_path, seeds=1))) == 8
    fake_lab.trained.clear()
    assert len(run_cifar10(cifar_settings(tmp_path, noise=[80], seeds=1))) == 10
    assert len(run_cifar10(cifar_settings(tmp_path, resume=False, seeds=1))) == 4
    assert len(fake_lab.trained) == 2 * (2 + 4)


def test_resume_does_not_mix_settings(fake_lab, tmp_path):
    run_cifar10(cifar_settings(tmp_path))
    with pytest.raises(loaders.DataError, match="is of --batch 2, not --batch 3"):
        run_cifar10(cifar_settings(tmp_path, batch=3))


def test_noise_leaves_right_all_but_three_methods(tmp_path):
    runs = cifar10.plan(cifar_settings(tmp_path, methods=None, seeds=1))
    assert [len(of(runs, noise_percent=noise)) for noise in (0, 60)] == [7, 3]
    settings = cifar_settings(tmp_path, methods=["ASAM", "ASAM"], seeds=1)
    assert [run["method"] for run in cifar10.plan(settings)] == ["ASAM", "ASAM"]


def test_noise_replaces_exactly_its_part_by_any_class():
    labels = np.full(5000, 10, np.int32)  # of no class, so that every change shows
    noisy = cifar10.add_noise(labels, 60, seed=0)
    assert noisy.dtype == labels.dtype
    assert np.all(labels == 10)
    counts = np.bincount(noisy)
    assert counts[10] == 2000
    assert np.all(np.abs(counts[:10] - 300) < 70)
    np.testing.assert_array_equal(noisy, cifar10.add_noise(labels, 60, seed=0))
    assert np.any(noisy != cifar10.add_noise(labels, 60, seed=1))
    np.testing.assert_array_equal(cifar10.add_noise(labels, 0, seed=0), labels)


def test_a_part_of_sorted_data_has_every_class():
    labels = np.repeat(np.arange(10), 20)
    data = loaders.Dataset(labels * 7, labels, labels * 7, labels)
    part = cifar10.take(data, 60, 70)
    assert [len(array) for array in part] == [60, 60, 70, 70]
    for images, kept in (part[:2], part[2:]):
        np.testing.assert_array_equal(images, kept * 7)  # each with its own label
        assert len(np.unique(kept)) == 10


def test_augmentation_moves_by_up_to_four_pixels_and_mirrors_half():
    n, size = 400, 32
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0] = np.arange(1, size + 1)[:, None]  # which row, and which column
    image[..., 1] = np.arange(1, size + 1)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {}
    for row in range(9):
        for start in range(9):
            window = padded[row : row + size, start : start + size]
            windows[window.tobytes()] = (row, start, False)
            windows[window[:, ::-1].tobytes()] = (row, start, True)
    images = jnp.tile(image, (n, 1, 1, 1))
    augmented = np.asarray(cifar10.crop_and_flip(jax.random.key(0), images))
    assert augmented.shape == images.shape
    assert augmented.dtype == np.uint8
    rows, starts, flips = zip(*(windows[a.tobytes()] for a in augmented), strict=True)
    assert set(rows) == set(starts) == set(range(9))
    assert abs(np.corrcoef(rows, starts)[0, 1]) < 0.2
    assert abs(np.mean(flips) - 0.5) < 0.1


def test_normalized_images_are_of_unit_scale():
    image = jnp.array(np.array(cifar10.MEAN) * 255)
    np.testing.assert_allclose(cifar10.normalize(image), 0, atol=1e-6)
    spread = cifar10.normalize(image + 255 * np.array(cifar10.DEVIATION))
    np.testing.assert_allclose(spread, 1, rtol=1e-5)


def test_the_resnet_is_that_of_the_papers():
    def count(**settings):
        model = resnet.ResNet(**settings)
        variables = jax.eval_shape(
            lambda key: cifar10.init_variables(model, key), jax.random.key(0)
        )
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
        return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    assert count() == 11_173_962
    assert count(blocks=(1,), width=2, dtype=jnp.bfloat16) == 168


MODEL = resnet.ResNet((1,), 2)


def random_images(n):
    rng = np.random.default_rng(0)
    x = jnp.array(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
    return x, jnp.array(rng.integers(0, 10, n, np.int32))


def train_one_epoch(method, program, batch):
    x, y = random_images(16)
    trainer = cifar10.make_trainer(MODEL, method, batch, 1, x, y, program)
    key = jax.random.key(0)
    return trainer.epoch(trainer.init(key), key, x, y)


def test_an_epoch_is_its_steps():
    method = cifar10.Method("sam", {"rho": 0.1})
    scanned, looped = (train_one_epoch(method, p, 8) for p in ("epoch", "step"))
    assert_trees_close(scanned, looped, rtol=1e-4, atol=1e-5)


def test_batch_statistics_never_see_the_perturbed_point():
    methods = (cifar10.Method(training.PLAIN, {}), cifar10.Method("sam", {"rho": 3.0}))
    plain, sam = (train_one_epoch(method, "step", 16)[0] for method in methods)
    assert_trees_close(plain.batch_stats, sam.batch_stats, rtol=1e-5)
    kernels = (state.params["Conv_0"]["kernel"] for state in (plain, sam))
    assert np.abs(np.subtract(*kernels)).max() > 1e-3


def test_evaluation_does_not_depend_on_the_batch():
    colors = np.random.default_rng(0).integers(0, 256, (16, 1, 1, 3), np.uint8)
    x = jnp.tile(colors, (1, 32, 32, 1))
    variables = cifar10.init_variables(MODEL, jax.random.key(0))
    state = cifar10.State(variables["params"], variables["batch_stats"], None)
    own = jnp.argmax(MODEL.apply(variables, cifar10.normalize(x), False), axis=-1)
    assert len(np.unique(own)) > 1
    for at_once in (1, 7, 16):
        assert cifar10.accuracy_percent(MODEL, state, x, own, at_once) == 100
    assert cifar10.accuracy_percent(MODEL, state, x, (own + 1) % 10) == 0


def test_a_training_that_diverged_is_measured_as_such():
    x, y = random_images(4)
    variables = cifar10.init_variables(MODEL, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, variables["params"])
    state = cifar10.State(params, variables["batch_stats"], None)
    loss_fn = cifar10.make_evaluation_loss(MODEL)
    measured = cifar10.measure_sharpness(loss_fn, state, x, y)
    assert list(measured) == cifar10.MEASURES
    assert np.all(np.isnan(list(measured.values())))


def test_a_batch_is_no_larger_than_the_data(tmp_path, capsys):
    write_like_cifar(tmp_path)
    with pytest.raises(SystemExit):
        cifar10.main(["--data", str(tmp_path), "--output", str(tmp_path)])
    assert "--batch: there are 80 training images" in capsys.readouterr().err


# --- What the scripts share -----------------------------------------------------------


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
        ("cifar10", [], "--data"),
        ("cifar10", ["--data", "empty"], "cifar-10-binary.tar.gz"),
        ("cifar10", ["--noise", "0", "101"], "'101'"),
        ("cifar10", ["--methods", "Adam"], "'Adam'"),
        ("cifar10", ["--budget", "0"], "'0'"),
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
