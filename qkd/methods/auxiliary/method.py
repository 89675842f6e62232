"""An auxiliary teacher as a method: it is trained from the teacher, and the student learns from it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qkd.methods.auxiliary.training import FOLDER, AuxiliaryRole, auxiliary_of
from qkd.methods.method import Guide, Method
from qkd.roles.nets import load_float, load_low_bit
from qkd.run.folder import RunFolder
from qkd.training.assembly import WEIGHTS, Context, Role


class Auxiliary(Method):
    """Method that puts a net between teacher and student."""

    @property
    def why_one_device(self) -> str:
        """Return an empty string: it is trained like a student."""
        return ""

    def sub_trainings(self, context: Context, before: str) -> Iterator[Role]:
        """Yield its own float training, if it has one, and its training from the teacher."""
        if before == "student":
            role = AuxiliaryRole(context)
            yield from role.sub_trainings()
            yield role

    def guide(self, run: RunFolder, below: Guide) -> Guide:
        """Return the auxiliary, which learned from what the student would otherwise learn from."""
        net = auxiliary_of(run.config).net or run.config.student_net
        return Guide(
            lambda: load_auxiliary(run),
            (*below.files, run.path / FOLDER / WEIGHTS),
            net,
            f"{net}, an auxiliary that learned from {below.words}",
            below,
            "the auxiliary teacher is not trained yet; this is the teacher it will learn from",
        )


def load_auxiliary(run: RunFolder) -> nn.Module:
    """Return the run's auxiliary teacher, low-bit or float, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If its file is damaged or of a different net.
    """
    quant, path = auxiliary_of(run.config).quant, run.path / FOLDER / WEIGHTS
    return load_float(path) if quant is None else load_low_bit(path, quant)
