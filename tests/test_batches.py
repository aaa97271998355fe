"""Means over batches, by group, and streams: which examples are seen, and when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_optax import sharpness
from sam_optax.sharpness import _batches
from sharpness_problem import Rows

N = 12


def rows(n=N):
    """Example i is the vector (i, 2 i)."""
    return np.stack([np.arange(n), 2 * np.arange(n)], axis=1).astype(np.float32)


def streamed(x, size):
    return sharpness.stream([x[i : i + size] for i in range(0, len(x), size)])


def seen(run):
    """What a function saw while the compiled program ran, by the index of the batch."""
    batches = {}

    def note(index, x):
        batches[int(index)] = np.asarray(x)[:, 0].tolist()

    def function(index, x):
        jax.debug.callback(note, index, x)
        return jnp.mean(x[:, 1] * x[:, 0])

    mean = run(function)
    jax.effects_barrier()
    return float(mean), batches


MEAN = float(np.mean(2 * np.arange(N) ** 2))


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (None, {0: [*range(12)]}),
        (100, {0: [*range(12)]}),
        (4, {i: [i, i + 3, i + 6, i + 9] for i in range(3)}),
        (5, {0: [0, 1, 2, 3, 4], 1: [5, 6, 7, 8, 9], 2: [10, 11]}),
        (7, {0: [0, 1, 2, 3, 4, 5, 6], 1: [7, 8, 9, 10, 11]}),
    ],
)
def test_batches_of_arrays(batch_size, expected):
    """Of equal batches, each takes every n-th example; others are consecutive."""
    mean, batches = seen(lambda f: _batches.mean_over_batches(f, (rows(),), batch_size))
    assert mean == pytest.approx(MEAN, rel=1e-6)
    assert batches == expected


@pytest.mark.parametrize("size", [4, 5, 12])
def test_batches_of_a_stream(size):
    data = streamed(rows(), size)
    mean, batches = seen(lambda f: _batches.mean_over_batches(f, data, None))
    assert mean == pytest.approx(MEAN, rel=1e-6)
    assert batches == {
        i: [*range(start, min(start + size, N))]
        for i, start in enumerate(range(0, N, size))
    }
    assert (data.size, data.count) == (N, -(-N // size))


def test_a_stream_of_one_short_batch_beside_whole_ones():
    """Two batches, of which the second has one example: it counts for one third."""
    data = sharpness.stream([np.float32([1, 2]), np.float32([9])])
    mean = _batches.mean_over_batches(lambda index, x: x.mean(), data, None)
    assert float(mean) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "streams"), [(None, 0), (2, 0), (4, 0), (8, 0), (None, 4), (None, 8)]
)
def test_groups_are_consecutive_examples(batch_size, streams):
    """The mean over groups of the squared mean of a group."""
    x = rows()[:, 0]
    data = streamed(x, streams) if streams else (x,)

    def function(key, x):
        assert x.shape == (2,)
        return jnp.square(x.mean())

    key = jax.random.key(0)
    mean = _batches.mean_over_groups(function, data, batch_size, 2, key)
    wanted = np.mean(np.square(x.reshape(6, 2).mean(1)))
    assert float(mean) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("batch_size", [None, 4, 12])
def test_each_group_has_a_key_of_its_own(batch_size):
    """In one batch after another, and among the groups of a batch."""
    keys = []

    def function(key, x):
        jax.debug.callback(lambda k: keys.append(tuple(k)), jax.random.key_data(key))
        return x.mean()

    def run(seed):
        keys.clear()
        data = (rows()[:, 0],)
        _batches.mean_over_groups(function, data, batch_size, 2, jax.random.key(seed))
        jax.effects_barrier()
        return {tuple(map(int, key)) for key in keys}

    assert len(run(0)) == 6
    assert not run(0) & run(1)


def test_the_key_of_a_group_does_not_depend_on_the_batch():
    """It is that of its number, also in a stream with a short last batch."""

    def keys_of(data, batch_size):
        found = {}

        def note(x, key):
            found[float(x[0])] = tuple(map(int, key))

        def function(key, x):
            jax.debug.callback(note, x, jax.random.key_data(key))
            return x.mean()

        _batches.mean_over_groups(function, data, batch_size, 2, jax.random.key(0))
        jax.effects_barrier()
        return found

    numbers = rows()[:, 0]
    expected = {
        2.0 * i: tuple(map(int, jax.random.key_data(key)))
        for i in range(6)
        for key in [jax.random.fold_in(jax.random.key(0), i)]
    }
    for batch_size in (None, 4, 6, 8, 12):
        assert keys_of((numbers,), batch_size) == expected
    for size in (4, 8):
        assert keys_of(streamed(numbers, size), None) == expected


@pytest.mark.parametrize("batches", [1000, 20_000])
def test_a_mean_over_many_batches_is_as_exact_as_over_one(batches):
    """A plain sum in float32 would be wrong in the second digit of this gap."""
    x = np.random.default_rng(0).uniform(0.9, 1.1, batches).astype(np.float32)

    def loss(w, x):
        return 2.305 + jnp.mean((w - x) ** 2) / 100

    gap = sharpness.surrogate_gap(loss, jnp.float32(1), x, rho=0.3, batch_size=1)
    away = 1 - x.astype(np.float64)
    slope = 2 * away.mean()
    assert float(gap.loss) == pytest.approx(2.305 + np.mean(away**2) / 100, abs=4e-7)
    rise = (0.3 * abs(slope) + 0.3**2) / 100
    assert float(gap.sharpness) == pytest.approx(rise, abs=6e-7)


def test_an_infinite_loss_stays_infinite():
    x = np.array([1.0, np.inf, 1.0, 2.0], np.float32)
    mean = _batches.mean_over_batches(lambda i, x: x.mean(), (x,), 1)
    assert mean == np.inf


def test_half_precision_is_summed_in_float32_and_every_leaf_is_a_mean():
    x = jnp.ones(4096, jnp.float16)

    def function(index, x):
        return {"half": x[0], "single": jnp.float32(index)}

    mean = _batches.mean_over_batches(function, (x,), 1)
    assert mean["half"].dtype == mean["single"].dtype == jnp.float32
    assert float(mean["half"]) == 1
    assert float(mean["single"]) == pytest.approx(4095 / 2, rel=1e-5)
    alone = _batches.mean_over_batches(function, (x,), None)
    assert alone["half"].dtype == jnp.float32
    uneven = _batches.mean_over_batches(function, (x[:3],), 2)
    assert uneven["half"].dtype == jnp.float32
    assert float(uneven["single"]) == pytest.approx(1 / 3)


# --- Streams.


def test_a_stream_reads_its_ends_when_it_is_made_and_batches_when_they_are_visited():
    batches = Rows([np.full((2, 1), i, np.float32) for i in range(4)])
    data = sharpness.stream(batches)
    assert batches.read == [0, 3]
    batches.read.clear()
    assert float(sharpness.gradient_norm(lambda w, x: (w * x).mean(), 1.0, data)) == 1.5
    assert sorted(batches.read) == [0, 1, 2, 3]


def test_a_stream_is_cast_to_the_dtypes_of_jax():
    """NumPy's float64 and int64 are float32 and int32 there."""
    x, y = np.arange(4.0), np.arange(4)

    def loss(w, x, y):
        assert (x.dtype, y.dtype) == (jnp.float32, jnp.int32)
        return (w * x * y).mean()

    data = sharpness.stream([(x[:3], y[:3]), (x[3:], y[3:])])
    assert float(sharpness.gradient_norm(loss, 1.0, data)) == pytest.approx(3.5)


def test_the_first_error_of_a_stream_is_raised_once():
    calls = []

    def fail():
        calls.append(1)
        raise OSError(f"error {len(calls)}")

    good = np.ones((2, 1), np.float32)
    batches = Rows([good, fail, fail, good])
    data = sharpness.stream(batches)
    with pytest.raises(OSError, match=r"error 1$"):
        sharpness.gradient_norm(lambda w, x: (w * x).mean(), 1.0, data)
    batches.items[1:3] = [good, good]
    assert sharpness.gradient_norm(lambda w, x: (w * x).mean(), 1.0, data) == 1


def test_a_batch_that_cannot_be_read_is_nan_inside_of_a_jitted_function():
    good = np.ones((2, 1), np.float32), np.ones(2, np.int32)

    def fail():
        raise OSError("gone")

    data = sharpness.stream(Rows([good, fail, good]))
    seen = []

    def loss(w, x, y):
        jax.debug.callback(lambda y: seen.append(y.tolist()), y)
        return (w * x[:, 0] * y).mean()

    norm = jax.jit(lambda data: sharpness.gradient_norm(loss, 1.0, data))(data)
    jax.effects_barrier()
    assert np.isnan(norm)
    assert [0, 0] in seen


def test_a_stream_of_integers_that_cannot_be_read_gives_nan_and_is_then_forgotten():
    """Nothing in a batch of integers can be NaN, so the mean over it must be."""
    good = np.ones((2, 1), np.int32)

    def fail():
        raise OSError("gone")

    for items in ([good, fail, good], [good, fail, good[:1]]):
        batches = Rows(items)
        data = sharpness.stream(batches)
        hessian = sharpness.hessian(lambda w, x: (w * x).mean() ** 2, 1.0, data)
        gap = functools.partial(sharpness.surrogate_gap, rho=0.1)

        def loss(w, x):
            return (w * x).mean()

        measured = jax.jit(lambda data: gap(loss, 1.0, data))(data)  # noqa: B023
        assert np.isnan(measured.loss) and np.isnan(measured.perturbed_loss)
        batches.items[1] = good
        assert hessian(1.0) == 2  # and does not raise for the read that failed before


def test_the_last_batch_of_a_stream_that_cannot_be_read():
    def fail():
        raise OSError("gone")

    good = np.ones((2, 1), np.int32)
    batches = Rows([good, good[:1]])
    data = sharpness.stream(batches)
    batches.items[1] = fail
    measured = jax.jit(
        lambda data: _batches.mean_over_batches(lambda i, x: x.mean(), data, None)
    )(data)
    assert np.isnan(measured)


def test_a_stream_that_was_deleted():
    data = sharpness.stream([np.ones((2, 1), np.float32)] * 2)
    measure = jax.jit(
        lambda data: _batches.mean_over_batches(lambda i, x: x.mean(), data, None)
    )
    leaves, structure = jax.tree.flatten(data)
    assert float(measure(structure.unflatten(leaves))) == 1
    del data
    with pytest.raises(Exception, match="Keep a reference to the stream"):
        jax.block_until_ready(measure(structure.unflatten(leaves)))


def test_streams_have_numbers_of_their_own():
    one, two = (sharpness.stream([np.full(2, i, np.float32)] * 2) for i in (1, 2))

    @jax.jit
    def mean(data):
        return _batches.mean_over_batches(lambda i, x: x.mean(), data, None)

    assert (float(mean(one)), float(mean(two))) == (1, 2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(1, (1,)), ((1, 2), (1, 2)), ([1, 2], (1, 2)), ({"a": 1}, ({"a": 1},))],
)
def test_what_the_arguments_of_the_loss_are(data, expected):
    assert _batches.as_arguments(data) == expected


def test_a_copy_of_a_stream_raises_the_error_of_reading_and_keeps_the_batches():
    class Failing(list):
        def __getitem__(self, index):
            if index == 1 and self.fails:
                raise OSError("no such file")
            return super().__getitem__(index)

    batches = Failing([np.ones((2, 3)), 2 * np.ones((2, 3)), np.ones((2, 3))])
    batches.fails = False
    H = sharpness.hessian(
        lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), sharpness.stream(batches)
    )
    whole = H(jnp.ones(3))
    copy = jax.tree.map(lambda x: x, H)
    del H
    np.testing.assert_array_equal(copy(jnp.ones(3)), whole)
    batches.fails = True
    with pytest.raises(OSError, match="no such file"):
        copy(jnp.ones(3))
