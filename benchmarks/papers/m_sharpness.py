"""m-sharpness: SAM with one perturbation for every m examples of an equal batch.

    python benchmarks/papers/m_sharpness.py

Foret et al., "Sharpness-Aware Minimization" (https://arxiv.org/abs/2010.01412), find
that accuracy grows as m falls. Here on scikit-learn's digits with right labels and with
40 % of them replaced, batches of 64, and m from the whole batch down to 2. Each m has
four radii to choose from, by the mean accuracy on 300 validation images; data and
settings are those of friendly.py.
"""

from typing import ClassVar

from friendly import RATE, train
from harness import Experiment, cases

MS = [64, 16, 8, 4, 2]
RHOS = [0.1, 0.2, 0.4, 0.8]
NOISES = [0, 40]


class MSharpness(Experiment):
    name, doc = "m_sharpness", __doc__
    options: ClassVar = {
        "seeds": (5, 2, "trainings with each setting"),
        "epochs": (60, 1, "passes over the training images"),
        "settings": (len(RHOS), 1, "of the radii, the first so many"),
        "ms": (MS, [64, 16], "examples that share a perturbation"),
    }

    def plan(self):
        rhos, seeds = RHOS[: self.args.settings], range(self.args.seeds)
        return cases(m=self.args.ms, noise=NOISES, rho=rhos, seed=seeds)

    def measure(self, m, noise, rho, seed):
        hyper = {"learning_rate": RATE, "rho": rho}
        validation, test, *_ = train("sam", hyper, noise, seed, self.args.epochs, m=m)
        return {"validation_percent": validation, "test_percent": test}

    def report(self):
        for noise in NOISES:
            mine = self.runs.of(noise=noise)
            groups = {str(m): mine.of(m=m) for m in self.args.ms}
            title = f"{noise} % wrong labels, m"
            self.pivot(title, groups, "test_percent", "rho", xscale="log")
            best = {m: g.best("validation_percent", "rho") for m, g in groups.items()}
            first = str(self.args.ms[0])
            columns = {"chosen rho": "rho", "test": ("test_percent", 1)}
            columns[f"less that of m = {first}"] = ("test_percent", None, first)
            self.summary(title, best, columns)


if __name__ == "__main__":
    MSharpness.main()
