"""The name under which sharding engines took the flat optimizer when AdamW was the only one."""

from .flat_optimizer import FlatOptimizer as FlatAdamW

__all__ = ["FlatAdamW"]
