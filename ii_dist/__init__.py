"""Distributed training of Inner-Imaging ResNets.

The path of a run, room by room: config (what) > runtime (who am I) > data (images) + models (network) > optim >
engine (one step) > train (the loop) > metrics (how fast, how good) + checkpoint (what stays).
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
