"""One record per method; tables and command lines are made from these."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import optax

from sam_optax import _data, _methods, _trajectory_loss, _wsam


class Method(NamedTuple):
    """What there is to know about a named method.

    Attributes:
      make: the function that builds the transformation; all its arguments have
        defaults.
      title: the name in words.
      equation: the method in one line; d = gᵃ unless it says otherwise.
      radius: the quantity that equals rho.
      gradients: gradient evaluations per step.
      source: where it was published.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    title: str
    equation: str
    radius: str
    gradients: str
    source: str


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sam": Method(
            _methods.sam,
            "SAM",
            "ε = ρ g/‖g‖",
            "‖ε‖",
            "2",
            "[Foret 2021](https://arxiv.org/abs/2010.01412)",
        ),
        "asam": Method(
            _methods.asam,
            "Adaptive SAM",
            "ε = ρ T² g/‖T g‖, T = abs(w) + η",
            "‖T⁻¹ε‖",
            "2",
            "[Kwon 2021](https://arxiv.org/abs/2102.11600)",
        ),
        "fsam": Method(
            _methods.fsam,
            "Friendly SAM",
            "ε = ρ h/‖h‖, h = g − σ EMA(g)",
            "‖ε‖",
            "2",
            "[Li 2024](https://arxiv.org/abs/2403.12350)",
        ),
        "fasam": Method(
            _methods.fasam,
            "Friendly Adaptive SAM",
            "ε = ρ T² h/‖T h‖, h as for `fsam`",
            "‖T⁻¹ε‖",
            "2",
            "[Li 2024](https://arxiv.org/abs/2403.12350)",
        ),
        "usam": Method(
            _methods.usam,
            "Unnormalised SAM",
            "ε = ρ g",
            "‖ε‖/‖g‖",
            "2",
            "[Andriushchenko 2022](https://arxiv.org/abs/2206.06232)",
        ),
        "gsam": Method(
            _methods.gsam,
            "Surrogate Gap Guided SAM",
            "d = gᵃ − α(g − proj g on gᵃ)",
            "‖ε‖",
            "2",
            "[Zhuang 2022](https://arxiv.org/abs/2203.08065)",
        ),
        "sam_plus_gap": Method(
            _methods.sam_plus_gap,
            "SAM with the gap as a penalty",
            "d = gᵃ + λ(gᵃ − g)",
            "‖ε‖",
            "2",
            "[Zhuang 2022](https://arxiv.org/abs/2203.08065)",
        ),
        "stable_sam": Method(
            _methods.stable_sam,
            "StableSAM",
            "d = (‖g‖/‖gᵃ‖) gᵃ",
            "‖ε‖",
            "2",
            "[Tan 2024](https://arxiv.org/abs/2401.07250)",
        ),
        "stable_asam": Method(
            _methods.stable_asam,
            "StableASAM",
            "ε as `asam`, d as `stable_sam`",
            "‖T⁻¹ε‖",
            "2",
            "[Tan 2024](https://arxiv.org/abs/2401.07250)",
        ),
        "stable_usam": Method(
            _methods.stable_usam,
            "Stable unnormalised SAM",
            "ε as `usam`, d as `stable_sam`",
            "‖ε‖/‖g‖",
            "2",
            "[Tan 2024](https://arxiv.org/abs/2401.07250)",
        ),
        "wsam": Method(
            _methods.wsam,
            "Weighted SAM",
            "d = g + γ/(1−γ) (gᵃ − g)",
            "‖ε‖",
            "2",
            "[Yue 2023](https://arxiv.org/abs/2305.15817)",
        ),
        "gradient_norm_penalty": Method(
            _methods.gradient_norm_penalty,
            "Gradient-norm penalty",
            "d = g + α(gᵃ − g)",
            "‖ε‖",
            "2",
            "[Zhao 2022](https://arxiv.org/abs/2202.03599)",
        ),
        "fisher_sam": Method(
            _methods.fisher_sam,
            "Fisher SAM",
            "ε = ρ F⁻¹g/√(gᵀF⁻¹g), F = 1 + η g²",
            "√(εᵀFε)",
            "2",
            "[Kim 2022](https://arxiv.org/abs/2206.04920)",
        ),
        "vasso": Method(
            _methods.vasso,
            "Variance-suppressed SAM",
            "ε = ρ m/‖m‖, m = EMA(g)",
            "‖ε‖",
            "2",
            "[Li 2023](https://arxiv.org/abs/2309.15639)",
        ),
        "sam_full": Method(
            _methods.sam_full,
            "SAM-full",
            "ε along the projection of g on the full gradient",
            "‖ε‖",
            "2",
            "[Li 2024](https://arxiv.org/abs/2403.12350)",
        ),
        "sam_noise": Method(
            _methods.sam_noise,
            "SAM-noise",
            "ε along g minus that projection",
            "‖ε‖",
            "2",
            "[Li 2024](https://arxiv.org/abs/2403.12350)",
        ),
        "look_sam": Method(
            _methods.look_sam,
            "LookSAM",
            "every k-th step SAM, and v = gᵃ − proj gᵃ on g is kept; "
            "else d = g + α‖g‖ v/‖v‖",
            "‖ε‖",
            "1 + 1/k",
            "[Liu 2022](https://arxiv.org/abs/2203.02714)",
        ),
        "sam_every_k": Method(
            _methods.sam_every_k,
            "SAM every k",
            "every k-th step SAM; else d = g",
            "‖ε‖",
            "1 + 1/k",
            "[Liu 2022](https://arxiv.org/abs/2203.02714)",
        ),
        "rst": Method(
            _methods.rst,
            "Randomized SAM training",
            "SAM with probability p; else d = g",
            "‖ε‖",
            "1 + p",
            "[Zhao 2022](https://arxiv.org/abs/2203.09962)",
        ),
        "ae_sam": Method(
            _methods.ae_sam,
            "Adaptive policy for SAM",
            "SAM where ‖g‖² ≥ mean + c · standard deviation, of its recent past; "
            "else d = g",
            "‖ε‖",
            "1 to 2",
            "[Jiang 2023](https://arxiv.org/abs/2304.14647)",
        ),
        "esam": Method(
            _methods.esam,
            "Efficient SAM, random mask",
            "ε = ρ g/‖g‖ · b/β, b random in {0, 1} with mean β",
            "‖E ε‖",
            "2",
            "[Du 2022](https://arxiv.org/abs/2110.03141)",
        ),
        "ssam": Method(
            _methods.ssam,
            "Sparse SAM (SSAM-F, SSAM-D)",
            "ε = b · ρ g/‖g‖, b a carried mask",
            "‖ε‖ before b",
            "2",
            "[Mi 2022](https://arxiv.org/abs/2210.05177)",
        ),
        "random_sam": Method(
            _methods.random_sam,
            "Random SAM",
            "ε random, N(0, ρ²/n), n parameters",
            "√(E‖ε‖²)",
            "1 + a forward pass",
            "[Ujváry 2022](https://arxiv.org/abs/2210.10452)",
        ),
        "rsam": Method(
            _methods.rsam,
            "R-SAM",
            "ε = δ + ρ g(w+δ)/‖g(w+δ)‖, δ random, N(0, σ²/n)",
            "‖ε − δ‖",
            "2 + a forward pass",
            "[Liu 2022](https://openreview.net/forum?id=htUvh7xPoa)",
        ),
        "multi_step_sam": Method(
            _methods.multi_step_sam,
            "SAM with n ascent steps",
            "n steps of ρ/n",
            "none; ‖ε‖ ≤ ρ",
            "n + 1",
            "[Foret 2021](https://arxiv.org/abs/2010.01412)",
        ),
    }
)


class FurtherMethod(NamedTuple):
    """What there is to know about a method that is no transformation.

    Attributes:
      make: the public function of this name.
      title: the name in words.
      equation: the method in one line.
      use: where what `make` returns goes.
      gradients: gradient evaluations per step.
      source: where it was published.
    """

    make: Callable[..., object]
    title: str
    equation: str
    use: str
    gradients: str
    source: str


FURTHER_METHODS: Mapping[str, FurtherMethod] = MappingProxyType(
    {
        "k_sam": FurtherMethod(
            _data.k_sam,
            "K-SAM",
            "both gradients on the k examples of highest loss",
            "`data=`",
            "2k/B + a forward pass",
            "[Ni 2022](https://arxiv.org/abs/2210.12864)",
        ),
        "largest_increase": FurtherMethod(
            _data.largest_increase,
            "Efficient SAM, selection",
            "gᵃ on the γB examples whose loss rose most",
            "`data=`",
            "1 + γ + a forward pass",
            "[Du 2022](https://arxiv.org/abs/2110.03141)",
        ),
        "sub_batch": FurtherMethod(
            _data.sub_batch,
            "Sub-batch ascent",
            "ε from a fraction of the batch",
            "`data=`",
            "1 + fraction",
            "",
        ),
        "saf": FurtherMethod(
            _trajectory_loss.saf,
            "Sharpness-Aware training for Free",
            "loss + λτ² KL(outputs of some epochs ago, outputs)",
            "a term of the loss",
            "1",
            "[Du 2022](https://arxiv.org/abs/2205.14083)",
        ),
        "mesa": FurtherMethod(
            _trajectory_loss.mesa,
            "Memory-Efficient Sharpness-Aware training",
            "loss + λτ² KL(outputs of the EMA model, outputs)",
            "a term of the loss",
            "1 + a forward pass",
            "[Du 2022](https://arxiv.org/abs/2205.14083)",
        ),
        "decoupled_wsam": FurtherMethod(
            _wsam.decoupled_wsam,
            "Weighted SAM, decoupled",
            "base step on g, then w − lr γ/(1−γ) (gᵃ − g)",
            "`sam, tx = decoupled_wsam(base, learning_rate)`, in place of the chain",
            "2",
            "[Yue 2023](https://arxiv.org/abs/2305.15817)",
        ),
    }
)


def methods_table() -> str:
    """The named methods as a Markdown table."""
    return _table(
        ["method", "", "equation", "equal to ρ", "gradients per step", "source"],
        METHODS,
    )


def further_methods_table() -> str:
    """What is no transformation, as a Markdown table."""
    return _table(
        ["name", "", "equation", "goes into", "gradients per step", "source"],
        FURTHER_METHODS,
    )


def _table(header: list[str], records: Mapping[str, tuple]) -> str:
    rows = [[f"`{name}`", *record[1:]] for name, record in records.items()]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(_line(cells) for cells in lines)


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
