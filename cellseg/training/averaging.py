"""Exponential moving average of the weights: what is validated, kept as best, and predicts."""

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of a model whose weights trail the trained ones.

    The decay warms up, min(decay, (1 + t) / (10 + t)) after t updates, so that a short run is
    not held back by its random start (the rule of TensorFlow's ExponentialMovingAverage).

    Attributes:
        model: the averaged model, in eval mode.
        decay: the decay that is reached in the end, 0-1.
        updates: number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        """Start from a copy of the model as it is."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; whole-number buffers are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged, current = [], []
        for own, new in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if own.is_floating_point():
                averaged.append(own)
                current.append(new.detach())
            else:
                own.copy_(new)
        torch._foreach_lerp_(averaged, current, 1 - decay)
