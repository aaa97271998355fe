"""Sharpness-aware training for JAX: every SAM method as an Optax transformation."""

from sam_optax._ascent import asam_ascent as asam_ascent
from sam_optax._ascent import fasam_ascent as fasam_ascent
from sam_optax._ascent import fisher_sam_ascent as fisher_sam_ascent
from sam_optax._ascent import follow_ema as follow_ema
from sam_optax._ascent import fsam_ascent as fsam_ascent
from sam_optax._ascent import normalize_by_global_norm as normalize_by_global_norm
from sam_optax._ascent import project_on_full_gradient as project_on_full_gradient
from sam_optax._ascent import sam_ascent as sam_ascent
from sam_optax._ascent import sam_full_ascent as sam_full_ascent
from sam_optax._ascent import sam_noise_ascent as sam_noise_ascent
from sam_optax._ascent import (
    scale_by_inverse_root_fisher as scale_by_inverse_root_fisher,
)
from sam_optax._ascent import scale_by_magnitude as scale_by_magnitude
from sam_optax._ascent import scale_by_rho as scale_by_rho
from sam_optax._ascent import subtract_ema as subtract_ema
from sam_optax._ascent import (
    subtract_projection_on_full_gradient as subtract_projection_on_full_gradient,
)
from sam_optax._ascent import usam_ascent as usam_ascent
from sam_optax._ascent import vasso_ascent as vasso_ascent
from sam_optax._batch import Batch as Batch
from sam_optax._batch import Pass as Pass
from sam_optax._cadence import Cadence as Cadence
from sam_optax._cadence import at_random as at_random
from sam_optax._cadence import every_k as every_k
from sam_optax._cadence import every_k_reusing as every_k_reusing
from sam_optax._cadence import every_step as every_step
from sam_optax._cadence import when_steep as when_steep
from sam_optax._carrier import Report as Report
from sam_optax._carrier import SharpnessAwareGradients as SharpnessAwareGradients
from sam_optax._core import SharpnessAwareState as SharpnessAwareState
from sam_optax._core import sharpness_aware as sharpness_aware
from sam_optax._data import Choice as Choice
from sam_optax._data import DataRule as DataRule
from sam_optax._data import k_sam as k_sam
from sam_optax._data import largest_increase as largest_increase
from sam_optax._data import sub_batch as sub_batch
from sam_optax._descent import blend as blend
from sam_optax._descent import penalize_gap as penalize_gap
from sam_optax._descent import renormalize as renormalize
from sam_optax._descent import surrogate_gap as surrogate_gap
from sam_optax._descent import weigh_gap as weigh_gap
from sam_optax._hyperparameters import (
    rho_from_learning_rate as rho_from_learning_rate,
)
from sam_optax._methods import ae_sam as ae_sam
from sam_optax._methods import asam as asam
from sam_optax._methods import esam as esam
from sam_optax._methods import fasam as fasam
from sam_optax._methods import fisher_sam as fisher_sam
from sam_optax._methods import fsam as fsam
from sam_optax._methods import gradient_norm_penalty as gradient_norm_penalty
from sam_optax._methods import gsam as gsam
from sam_optax._methods import look_sam as look_sam
from sam_optax._methods import multi_step_sam as multi_step_sam
from sam_optax._methods import random_sam as random_sam
from sam_optax._methods import rsam as rsam
from sam_optax._methods import rst as rst
from sam_optax._methods import sam as sam
from sam_optax._methods import sam_every_k as sam_every_k
from sam_optax._methods import sam_full as sam_full
from sam_optax._methods import sam_noise as sam_noise
from sam_optax._methods import sam_plus_gap as sam_plus_gap
from sam_optax._methods import ssam as ssam
from sam_optax._methods import stable_asam as stable_asam
from sam_optax._methods import stable_sam as stable_sam
from sam_optax._methods import stable_usam as stable_usam
from sam_optax._methods import usam as usam
from sam_optax._methods import vasso as vasso
from sam_optax._methods import wsam as wsam
from sam_optax._noise import ascend_from_noise as ascend_from_noise
from sam_optax._noise import ascend_repeatedly as ascend_repeatedly
from sam_optax._noise import mask_at_random as mask_at_random
from sam_optax._noise import replace_by_noise as replace_by_noise
from sam_optax._recorder import Recorder as Recorder
from sam_optax._registry import FURTHER_METHODS as FURTHER_METHODS
from sam_optax._registry import METHODS as METHODS
from sam_optax._registry import FurtherMethod as FurtherMethod
from sam_optax._registry import Method as Method
from sam_optax._registry import further_methods_table as further_methods_table
from sam_optax._registry import methods_table as methods_table
from sam_optax._sparse import drop_and_grow as drop_and_grow
from sam_optax._sparse import keep_largest_fisher as keep_largest_fisher
from sam_optax._trajectory_loss import TrajectoryLoss as TrajectoryLoss
from sam_optax._trajectory_loss import mesa as mesa
from sam_optax._trajectory_loss import saf as saf
from sam_optax._value_and_grad import sam_value_and_grad as sam_value_and_grad
from sam_optax._value_and_grad import value_and_ascent_grad as value_and_ascent_grad
from sam_optax._wsam import decoupled_wsam as decoupled_wsam

__version__ = "0.1.0"
