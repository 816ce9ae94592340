"""The arithmetic of training a slice. Torch only."""

from slicefine.kernel.moments import reset_moments
from slicefine.kernel.slice_linear import slice_linear, vectors

__all__ = ["reset_moments", "slice_linear", "vectors"]
