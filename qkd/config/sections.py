"""Building blocks of the schema: the base class of a section, and numbers with a range.

Every number has an upper bound: far above what anyone uses, far below what a machine
chokes on. ``10**40`` pixels of padding or 100,000 threads are typos, and are reported with their place in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from export.defaults import MOST_BATCH, MOST_THREADS
from qkd.files.user_paths import user_path

LARGEST = 1e6  # for a factor, weight, temperature, decay or time in seconds (eleven days)
MOST_EPOCHS = 1_000_000
MOST_IMAGES = 1_000_000_000
MOST_PIXELS = 4096  # side of an image; nets for larger ones do not fit in memory during training
MOST_WORKERS = 256
MOST_MEMBERS = 1024  # of a population or an ensemble
LONGEST_TEXT = 4096  # characters; the longest path that Linux takes

Bits = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Epochs = Annotated[int, Field(ge=1, le=MOST_EPOCHS)]
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "step", "constant"]  # of the learning rate, after its warm-up
BatchSize = Annotated[int, Field(ge=1, le=MOST_BATCH)]
Pixels = Annotated[int, Field(ge=0, le=MOST_PIXELS)]
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Workers = Annotated[int, Field(ge=0, le=MOST_WORKERS)]
Cpu = Annotated[int, Field(ge=0, lt=8192)]  # index of a CPU; Linux supports at most this many


def _not_empty(value: object) -> object:
    if value == "":  # which pathlib takes for the current folder
        raise ValueError("must name a file or folder, got '' (the current folder is `.`)")
    return value


UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(user_path)]  # `~` is the home folder


class _Newer:
    """Marks a key that the first version did not have. Hashes of settings include it only if it is not the default."""


NEWER = _Newer()


class Section(BaseModel):
    """A group of keys. It is frozen, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=LONGEST_TEXT)

    def tried(self, batch_size: int) -> Section:  # noqa: ARG002
        """Return the section for a dry run, with its step counts reduced.

        Args:
            batch_size: Images per batch of the student, in the dry run.
        """
        return self


def without_defaults(section: Section, values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a section's values without newer keys at their defaults, so that hashes of older runs do not change.

    Args:
        section: The section.
        values: Its values, as pydantic writes them.
        keys: The newer ones.
    """
    fields = type(section).model_fields
    unused = {key for key in keys if getattr(section, key) == fields[key].get_default(call_default_factory=True)}
    return {key: value for key, value in values.items() if key not in unused}
