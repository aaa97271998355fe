"""The step: one ascent, one descent and one cadence, from g to d."""

from sam_optax._step.carrier import ReportSlot as ReportSlot
from sam_optax._step.carrier import SharpnessAwareGradients as SharpnessAwareGradients
from sam_optax._step.carrier import ValueSlot as ValueSlot
from sam_optax._step.report import Report as Report
from sam_optax._step.sharpness_aware import Options as Options
from sam_optax._step.sharpness_aware import SharpnessAwareState as SharpnessAwareState
from sam_optax._step.sharpness_aware import sharpness_aware as sharpness_aware
