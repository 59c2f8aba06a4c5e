"""A score of its own for each expert, at most 1."""

import torch

SCORE = torch.sigmoid
