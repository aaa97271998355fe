"""m-sharpness: SAM with one perturbation for every m examples of an equal batch.

    python benchmarks/papers/m_sharpness.py

Foret et al. (https://arxiv.org/abs/2010.01412) find that accuracy grows as m falls.
Here the data and settings are those of friendly.py, and each m chooses a radius of four
by the accuracy on validation images.
"""

from friendly import RATE, train
from harness import Experiment, arguments, cases

MS = [64, 16, 8, 4, 2]
RHOS = [0.1, 0.2, 0.4, 0.8]
NOISES = [0, 40]


class MSharpness(Experiment):
    options = arguments(
        seeds=(5, 2, "trainings with each setting"),
        epochs=(60, 1, "passes over the training images"),
        settings=(len(RHOS), 1, "of the radii, the first so many"),
        ms=(MS, [64, 16], "that share a perturbation", {"choices": MS}),
    )

    def plan(self):
        rhos, seeds = RHOS[: self.args.settings], range(self.args.seeds)
        return cases(m=self.args.ms, noise=NOISES, rho=rhos, seed=seeds)

    def measure(self, m, noise, rho, seed):
        hyper = {"learning_rate": RATE, "rho": rho}
        validation, test, *_ = train("sam", hyper, noise, seed, self.args.epochs, m=m)
        return {"validation_percent": validation, "test_percent": test}

    def report(self):
        first, columns = self.args.ms[0], {"chosen rho": "rho"}
        columns["test"] = ("test_percent", 1)
        columns[f"less that of m = {first}"] = ("test_percent", None, first)
        for noise, mine in self.runs.by("noise").items():
            title, groups = f"{noise} % wrong labels, m", mine.by("m", self.args.ms)
            self.pivot(title, groups, "test_percent", "rho", xscale="log")
            best = {m: g.best("validation_percent", "rho") for m, g in groups.items()}
            self.summary(title, best, columns)


if __name__ == "__main__":
    MSharpness.main()
