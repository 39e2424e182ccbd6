"""zerofit: trains models on the GPUs you have, and says beforehand what fits."""

__version__ = "0.1.0"
