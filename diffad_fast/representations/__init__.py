"""Raw input to the tensor that is diffused, and back."""

from .wavelet import WaveletRepresentation

__all__ = ["WaveletRepresentation"]
