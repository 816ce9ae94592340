"""The tuner for PEFT. Importing it registers the method."""

from slicefine.tuner.config import SliceFineConfig
from slicefine.tuner.coupling import couplings
from slicefine.tuner.inspection import active_slices, parameter_counts, touched_slices
from slicefine.tuner.model import SliceFineModel
from slicefine.tuner.registration import register

register()

__all__ = ["SliceFineConfig", "SliceFineModel", "active_slices", "couplings", "parameter_counts", "touched_slices"]
