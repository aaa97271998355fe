"""Measures of sharpness: plain functions of a loss, parameters and data.

They do not depend on how the parameters were trained, and take any differentiable loss.
Every measure is one compiled program that visits the data one batch at a time.
"""

from sam_optax.sharpness._ball import Sharpness as Sharpness
from sam_optax.sharpness._ball import average_case as average_case
from sam_optax.sharpness._ball import eigenvalue_from_gap as eigenvalue_from_gap
from sam_optax.sharpness._ball import surrogate_gap as surrogate_gap
from sam_optax.sharpness._ball import worst_case as worst_case
from sam_optax.sharpness._batches import Stream as Stream
from sam_optax.sharpness._batches import stream as stream
from sam_optax.sharpness._compare import Comparison as Comparison
from sam_optax.sharpness._compare import compare as compare
from sam_optax.sharpness._estimate import Estimate as Estimate
from sam_optax.sharpness._landscape import Line as Line
from sam_optax.sharpness._landscape import Surface as Surface
from sam_optax.sharpness._landscape import along_line as along_line
from sam_optax.sharpness._landscape import (
    filter_normalized_direction as filter_normalized_direction,
)
from sam_optax.sharpness._landscape import gradient_direction as gradient_direction
from sam_optax.sharpness._landscape import interpolate as interpolate
from sam_optax.sharpness._landscape import over_plane as over_plane
from sam_optax.sharpness._landscape import random_direction as random_direction
from sam_optax.sharpness._matrices import Matrix as Matrix
from sam_optax.sharpness._matrices import empirical_fisher as empirical_fisher
from sam_optax.sharpness._matrices import fisher_trace as fisher_trace
from sam_optax.sharpness._matrices import gauss_newton as gauss_newton
from sam_optax.sharpness._matrices import gradient_norm as gradient_norm
from sam_optax.sharpness._matrices import hessian as hessian
from sam_optax.sharpness._spectrum import Eigenpairs as Eigenpairs
from sam_optax.sharpness._spectrum import SpectralDensity as SpectralDensity
from sam_optax.sharpness._spectrum import eigenpairs as eigenpairs
from sam_optax.sharpness._spectrum import spectral_density as spectral_density
from sam_optax.sharpness._spectrum import trace as trace
