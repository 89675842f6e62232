"""Progressive widths as a method: trainings before the student's, and the initial weights that they give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qkd.methods.method import Method
from qkd.methods.widths.training import WidthRole, weights_of
from qkd.run.folder import RunFolder
from qkd.training.assembly import Context, Role
from quantizers import Student
from quantizers.recipes.carrying import carry_over


class Widths(Method):
    """Method that trains the student in the widths of ``student.widths``, in order, each from the previous one."""

    @property
    def why_one_device(self) -> str:
        """Return an empty string: each is trained like a student."""
        return ""

    def sub_trainings(self, context: Context, before: str) -> Iterator[Role]:
        """Yield the training in each of the widths."""
        if before == "student":
            yield from (WidthRole(context, index) for index in range(len(self.config.student.widths)))

    def start(self, run: RunFolder, student: Student) -> None:
        """Give the student the weights of the last of the widths."""
        carry_over(student, weights_of(run, len(self.config.student.widths) - 1))

    def made_from(self, run: RunFolder) -> Mapping[str, Path]:
        """Return the weights that the student starts from."""
        last = len(self.config.student.widths) - 1
        return {"widths": WidthRole.weights_file(run, last)}
