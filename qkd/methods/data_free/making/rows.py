"""The part of a result that comes from making images, as a report reads it."""

from __future__ import annotations

from pydantic import model_validator

from qkd.report.records import Count, Images, Record, Share


class MadeRecord(Record):
    """What a teacher sees in the images of a generator or pool; empty in the results of nets."""

    method: str | None = None
    steps: Count | None = None
    images: Images | None = None
    mean_confidence: Share | None = None
    class_histogram: list[Count] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> MadeRecord:
        if self.class_histogram is None:
            return self
        if None in (self.method, self.steps, self.images, self.mean_confidence):
            raise ValueError("a class_histogram needs method, steps, images and mean_confidence")
        if sum(self.class_histogram) != self.images:
            raise ValueError(f"class_histogram counts {sum(self.class_histogram)} images of {self.images}")
        return self
