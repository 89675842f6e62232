"""Data sets: loaded, checked, divided, and handed out as ``uint8`` batches in a seeded order."""

from qkd.data.batches import iterate, normalise
from qkd.data.errors import DataError
from qkd.data.load import DATASETS, load_splits
from qkd.data.quiz import take_quiz
from qkd.data.sampling import epoch_order
from qkd.data.shapes import ImageShape, image_shape
from qkd.data.splits import MemorySplit, Split, Splits

__all__ = [
    "DATASETS",
    "DataError",
    "ImageShape",
    "MemorySplit",
    "Split",
    "Splits",
    "epoch_order",
    "image_shape",
    "iterate",
    "load_splits",
    "normalise",
    "take_quiz",
]
