"""Readers of data sets, one module per kind: NumPy archives, image folders, torchvision's sets, the digits."""

from qkd.data.sets.arrays import load_npz_splits
from qkd.data.sets.digits import load_digits_splits
from qkd.data.sets.fitting import Fit
from qkd.data.sets.folder import FolderSplit, Form, list_folder, load_folder_splits
from qkd.data.sets.resized import resize_parts
from qkd.data.sets.rows import ArraySplit
from qkd.data.sets.vision import VISION_SETS, load_vision_splits

__all__ = [
    "VISION_SETS",
    "ArraySplit",
    "Fit",
    "FolderSplit",
    "Form",
    "list_folder",
    "load_digits_splits",
    "load_folder_splits",
    "load_npz_splits",
    "load_vision_splits",
    "resize_parts",
]
