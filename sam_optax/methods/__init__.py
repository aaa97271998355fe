"""The named methods, one file for each family of papers, and their records.

`METHODS` holds a record for every method that is a transformation, and
`FURTHER_METHODS` one for every other. With the decorator `record`, a method of your own
joins them.
"""

# isort: off
# Importing a file records its methods, and the tables list them in this order.
from sam_optax.methods._k_sam import k_sam as k_sam
from sam_optax.methods._sam import sam as sam
from sam_optax.methods._asam import asam as asam
from sam_optax.methods._friendly import fsam as fsam
from sam_optax.methods._friendly import fasam as fasam
from sam_optax.methods._usam import usam as usam
from sam_optax.methods._unified_sam import unified_sam as unified_sam
from sam_optax.methods._unified_sam import monge_sam as monge_sam
from sam_optax.methods._le_sam import le_sam as le_sam
from sam_optax.methods._zsharp import zsharp as zsharp
from sam_optax.methods._gsam import gsam as gsam
from sam_optax.methods._gsam import sam_plus_gap as sam_plus_gap
from sam_optax.methods._stable_sam import stable_sam as stable_sam
from sam_optax.methods._stable_sam import stable_asam as stable_asam
from sam_optax.methods._stable_sam import stable_usam as stable_usam
from sam_optax.methods._wsam import wsam as wsam
from sam_optax.methods._wsam import gradient_norm_penalty as gradient_norm_penalty
from sam_optax.methods._sagm import sagm as sagm
from sam_optax.methods._cr_sam import cr_sam as cr_sam
from sam_optax.methods._gam import gam as gam
from sam_optax.methods._fisher_sam import fisher_sam as fisher_sam
from sam_optax.methods._vasso import vasso as vasso
from sam_optax.methods._sam_full import sam_full as sam_full
from sam_optax.methods._sam_full import sam_noise as sam_noise
from sam_optax.methods._look_sam import look_sam as look_sam
from sam_optax.methods._look_sam import sam_every_k as sam_every_k
from sam_optax.methods._rst import rst as rst
from sam_optax.methods._ae_sam import ae_sam as ae_sam
from sam_optax.methods._ae_sam import ae_look_sam as ae_look_sam
from sam_optax.methods._esam import esam as esam
from sam_optax.methods._esam import largest_increase as largest_increase
from sam_optax.methods._ssam import ssam as ssam
from sam_optax.methods._random_sam import random_sam as random_sam
from sam_optax.methods._random_sam import rsam as rsam
from sam_optax.methods._eigen_sam import eigen_sam as eigen_sam
from sam_optax.methods._lpf_sgd import lpf_sgd as lpf_sgd
from sam_optax.methods._tsam import tsam as tsam
from sam_optax.methods._universal_sam import universal_sam as universal_sam
from sam_optax.methods._multi_step_sam import multi_step_sam as multi_step_sam
from sam_optax.methods._msam import msam as msam
from sam_optax.methods._late_sam import late_sam as late_sam
from sam_optax.methods._sampa import sampa as sampa
from sam_optax.methods._sam_on import layerwise_sam as layerwise_sam
from sam_optax.methods._sam_on import sam_on as sam_on
from sam_optax.methods._sub_batch import sub_batch as sub_batch
from sam_optax.methods._functional_sam import functional as functional
from sam_optax.methods._imbalanced import imb_sam as imb_sam
from sam_optax.methods._imbalanced import focal_sam as focal_sam
from sam_optax.methods._bisam import bisam_loss as bisam_loss
from sam_optax.methods._saf import TrajectoryLoss as TrajectoryLoss
from sam_optax.methods._saf import saf as saf
from sam_optax.methods._saf import mesa as mesa
from sam_optax.methods._decoupled_wsam import decoupled_wsam as decoupled_wsam
from sam_optax.methods._lookbehind_sam import lookbehind_sam as lookbehind_sam
from sam_optax.methods._entropy_sgd import entropy_sgd as entropy_sgd
from sam_optax.methods._bsam import bsam as bsam
from sam_optax.methods._polyak_sam import polyak_sam as polyak_sam
# isort: on

from sam_optax._step import Options as Options
from sam_optax.methods._bsam import draw_from_bsam as draw_from_bsam
from sam_optax.methods._record import FURTHER_METHODS as FURTHER_METHODS
from sam_optax.methods._record import METHODS as METHODS
from sam_optax.methods._record import FurtherMethod as FurtherMethod
from sam_optax.methods._record import Method as Method
from sam_optax.methods._record import further_methods_table as further_methods_table
from sam_optax.methods._record import methods_table as methods_table
from sam_optax.methods._record import record as record
from sam_optax.methods._sam_on import mask_by_name as mask_by_name
from sam_optax.methods._sam_on import normalization_layers as normalization_layers
