"""Data sets: load, check and split them, and iterate over ``uint8`` batches in a seeded order."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.data.batches import iterate, normalize
    from qkd.data.errors import DataError
    from qkd.data.loading.facts import DataFacts, changes, sampling_note
    from qkd.data.loading.load import DATASETS, load_splits, read_facts
    from qkd.data.loading.shapes import ImageShape, image_shape
    from qkd.data.quiz import take_quiz
    from qkd.data.sampling import epoch_order
    from qkd.data.splits import MemorySplit, Split, Splits
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "DATASETS",
    "DataError",
    "DataFacts",
    "ImageShape",
    "MemorySplit",
    "Split",
    "Splits",
    "changes",
    "epoch_order",
    "image_shape",
    "iterate",
    "load_splits",
    "normalize",
    "read_facts",
    "sampling_note",
    "take_quiz",
]
