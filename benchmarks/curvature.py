"""How much memory and time it takes to measure curvature, on a ResNet-18.

Run it with::

    python benchmarks/curvature.py

It compiles measures of `sam_optax.sharpness` for data sets of several sizes, and prints
the temporary memory that the compiler reports, which must not grow with the data. With
`--run` it also computes two eigenvalues, and divides the time of a product with the
Hessian by that of a gradient.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from measure import compile_program, ratios, time_in_turn
from models import MODELS, make_loss
from rich.console import Console
from rich.table import Table

from sam_optax import sharpness

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="resnet18")
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[64, 512, 4096], help="of the data"
    )
    parser.add_argument("--products", type=int, default=8, help="steps of Lanczos")
    parser.add_argument("--run", action="store_true", help="also run, not only compile")
    args = parser.parse_args()

    model = MODELS[args.model]
    params = model.init(jax.random.key(0), model.width)
    loss_fn = make_loss(model.predict, jnp.float32)

    def matrix(params, x, y):
        return sharpness.hessian(loss_fn, params, (x, y), batch_size=args.batch)

    measures = {
        "product with the Hessian": lambda w, x, y: matrix(w, x, y)(w),
        f"eigenpairs, {args.products} products": lambda w, x, y: sharpness.eigenpairs(
            matrix(w, x, y), num_matvecs=args.products
        ),
        "trace": lambda w, x, y: sharpness.trace(matrix(w, x, y)),
        "surrogate gap": lambda w, x, y: sharpness.surrogate_gap(
            loss_fn, w, (x, y), rho=0.1, batch_size=args.batch
        ),
    }
    console = Console()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {args.model}, "
        f"{size:,} parameters ({size * 4 / MIB:.0f} MiB), batches of {args.batch}"
    )
    table = Table("temporary memory, MiB", *(f"{n} examples" for n in args.examples))
    for name, measure in measures.items():
        cells = []
        for count in args.examples:
            data = jnp.zeros((count, *model.image)), jnp.zeros(count, jnp.int32)
            program = compile_program(measure, params, *data)
            cells.append(f"{program.temporary_bytes / MIB:.1f}")
        table.add_row(name, *cells)
        console.print(f"compiled: {name}")
    console.print(table)
    if not args.run:
        return

    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (2 * args.batch, *model.image))
    y = jax.random.randint(keys[1], (2 * args.batch,), 0, 10)
    programs = {
        "gradient": compile_program(
            lambda w, x, y: jax.lax.map(
                lambda batch: jax.grad(loss_fn)(w, *batch), (x, y)
            ),
            params,
            x.reshape(2, args.batch, *x.shape[1:]),
            y.reshape(2, args.batch),
        ),
        "product": compile_program(measures["product with the Hessian"], params, x, y),
    }
    calls = {
        name: functools.partial(program.run, *program.arguments)
        for name, program in programs.items()
    }
    times = time_in_turn(calls, rounds=5)
    spread = ratios(times["product"], times["gradient"])
    console.print(f"a product takes {spread} gradients, in 5 pairs")
    pairs = sharpness.eigenpairs(
        matrix(params, x, y), 2, num_matvecs=max(2, args.products)
    )
    console.print(f"eigenvalues {pairs.values}, off by at most {pairs.residuals}")


if __name__ == "__main__":
    main()
