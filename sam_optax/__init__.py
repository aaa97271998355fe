"""Sharpness-aware training for JAX: every SAM method as an Optax transformation.

The named methods and the helpers are here. Methods are composed of parts, which are in
the namespaces `ascents`, `descents`, `cadences` and `data`. Import `sharpness`, `plot`
and `nnx` by name, because they need more than JAX and Optax.
"""

from sam_optax import ascents as ascents
from sam_optax import cadences as cadences
from sam_optax import data as data
from sam_optax import descents as descents
from sam_optax import methods as methods
from sam_optax._doors import sam_value_and_grad as sam_value_and_grad
from sam_optax._doors import value_and_ascent_grad as value_and_ascent_grad
from sam_optax._hyperparameters import rho_from_learning_rate as rho_from_learning_rate
from sam_optax._recorder import Recorder as Recorder
from sam_optax._step import Report as Report
from sam_optax._step import SharpnessAwareGradients as SharpnessAwareGradients
from sam_optax._step import SharpnessAwareState as SharpnessAwareState
from sam_optax._step import sharpness_aware as sharpness_aware
from sam_optax.methods import METHODS as METHODS
from sam_optax.methods import ae_look_sam as ae_look_sam
from sam_optax.methods import ae_sam as ae_sam
from sam_optax.methods import asam as asam
from sam_optax.methods import bisam_loss as bisam_loss
from sam_optax.methods import bsam as bsam
from sam_optax.methods import cr_sam as cr_sam
from sam_optax.methods import decoupled_wsam as decoupled_wsam
from sam_optax.methods import eigen_sam as eigen_sam
from sam_optax.methods import entropy_sgd as entropy_sgd
from sam_optax.methods import esam as esam
from sam_optax.methods import fasam as fasam
from sam_optax.methods import fisher_sam as fisher_sam
from sam_optax.methods import fsam as fsam
from sam_optax.methods import gam as gam
from sam_optax.methods import gradient_norm_penalty as gradient_norm_penalty
from sam_optax.methods import gsam as gsam
from sam_optax.methods import late_sam as late_sam
from sam_optax.methods import layerwise_sam as layerwise_sam
from sam_optax.methods import le_sam as le_sam
from sam_optax.methods import look_sam as look_sam
from sam_optax.methods import lookbehind_sam as lookbehind_sam
from sam_optax.methods import lpf_sgd as lpf_sgd
from sam_optax.methods import mesa as mesa
from sam_optax.methods import monge_sam as monge_sam
from sam_optax.methods import msam as msam
from sam_optax.methods import multi_step_sam as multi_step_sam
from sam_optax.methods import polyak_sam as polyak_sam
from sam_optax.methods import random_sam as random_sam
from sam_optax.methods import rsam as rsam
from sam_optax.methods import rst as rst
from sam_optax.methods import saf as saf
from sam_optax.methods import sagm as sagm
from sam_optax.methods import sam as sam
from sam_optax.methods import sam_every_k as sam_every_k
from sam_optax.methods import sam_full as sam_full
from sam_optax.methods import sam_noise as sam_noise
from sam_optax.methods import sam_on as sam_on
from sam_optax.methods import sam_plus_gap as sam_plus_gap
from sam_optax.methods import sampa as sampa
from sam_optax.methods import ssam as ssam
from sam_optax.methods import stable_asam as stable_asam
from sam_optax.methods import stable_sam as stable_sam
from sam_optax.methods import stable_usam as stable_usam
from sam_optax.methods import tsam as tsam
from sam_optax.methods import unified_sam as unified_sam
from sam_optax.methods import universal_sam as universal_sam
from sam_optax.methods import usam as usam
from sam_optax.methods import vasso as vasso
from sam_optax.methods import wsam as wsam
from sam_optax.methods import zsharp as zsharp

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Says where to find what is not at the top level, or has another name now."""
    renamed = {
        "surrogate_gap": "descents.gsam, or sharpness.surrogate_gap for the measure",
        "weigh_gap": "descents.blend, with the weight gamma / (1 - gamma)",
        "penalize_gap": "descents.blend, with the weight 1 + lam",
    }
    for space in (ascents, descents, cadences, data, methods):
        for moved in (name, name.removesuffix("_ascent")):
            if hasattr(space, moved) and name not in renamed:
                renamed[name] = f"{space.__name__.removeprefix('sam_optax.')}.{moved}"
    if name in renamed and not name.startswith("_"):
        raise AttributeError(
            f"sam_optax has no {name}: take sam_optax.{renamed[name]}."
        )
    raise AttributeError(f"module 'sam_optax' has no attribute {name!r}")
