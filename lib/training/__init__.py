"""Training: a Recipe says what is trained, `train` trains an ensemble of models into a store."""

from lib.training.recipe import Recipe
from lib.training.workers import train

__all__ = ["Recipe", "train"]
