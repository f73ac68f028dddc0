"""Dropout, by masks that a CPU makes several times faster than torch does.

torch takes a random number of 24 bits and more for each element, one after the other: for a model of 10 million
parameters a third of a training step. 16 bits per element are enough to drop a share that is off by less than 1e-5.
"""

import math

import torch
import torch.nn as nn


class Dropout(nn.Dropout):
    """nn.Dropout: in training, zeroes a share p of the elements and scales the others (Srivastava et al. 2014)."""

    def forward(self, x):
        """x of any shape -> the same."""
        if self.training and self.p and masks_pay(x):
            return x * dropout_mask(x.shape, self.p).to(x.dtype)
        return super().forward(x)


def masks_pay(x: torch.Tensor) -> bool:
    """Is this tensor on a CPU, and not being compiled? Others drop elements in the pass that computes them."""
    return x.device.type == 'cpu' and not torch.compiler.is_compiling()


def dropout_mask(shape, p: float) -> torch.Tensor:
    """Random factors, float32 on the CPU: 0 with probability p in [0, 1), else 1 / (1 - p). Seeded by torch's global
    generator."""
    n = math.prod(shape)
    words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits are random
    dropped_below = min(round(2**16 * p), 2**16 - 1) - 2**15  # of numbers from -2**15 on
    return torch.where(words.view(torch.int16)[:n] < dropped_below, 0.0, 1 / (1 - p)).view(shape)
