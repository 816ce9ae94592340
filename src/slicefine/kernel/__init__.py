"""The arithmetic of training a slice. Torch only."""

from slicefine.kernel.moments import reset_moments
from slicefine.kernel.slice_conv import slice_conv
from slicefine.kernel.slice_embedding import slice_embedding
from slicefine.kernel.slice_linear import slice_linear, vectors

__all__ = ["reset_moments", "slice_conv", "slice_embedding", "slice_linear", "vectors"]
