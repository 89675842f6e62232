"""The low-bit network that ``prepare`` makes: an fx graph of known modules, with paths like the float network's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from quantizers.layers import Probabilities
from quantizers.spec import QuantSpec


class Student(fx.GraphModule):
    """A low-bit network: an fx graph of known modules only (:func:`prepare` makes it)."""

    @property
    def tap_paths(self) -> dict[str, str]:
        """Module path of the float network -> path of the submodule here that gives the same (dequantised) output."""
        return self.meta["tap_paths"]  # type: ignore[no-any-return]

    @property
    def spec(self) -> QuantSpec:
        """Return the bits and quantizers the student was prepared with."""
        return self.meta["spec"]  # type: ignore[no-any-return]


def assemble(
    graph: fx.Graph, modules: Mapping[str, nn.Module], *, tap_paths: dict[str, str], spec: QuantSpec
) -> Student:
    """Return the student that runs ``graph`` on ``modules`` (module path -> module).

    A softmax becomes :class:`~quantizers.layers.Probabilities`, which lets logits through in training mode.
    """
    root = nn.Module()
    for path, module in modules.items():
        _place(root, path, _for_losses(module))
    student = Student(root, graph, class_name="Student")
    student.meta.update(tap_paths=tap_paths, spec=spec)
    return student


def _for_losses(module: nn.Module) -> nn.Module:
    if not isinstance(module, (nn.Softmax, nn.LogSoftmax)):
        return module
    axis = 1 if module.dim is None else int(module.dim)  # torch's own choice for two and four axes
    return Probabilities(axis, is_log=isinstance(module, nn.LogSoftmax))


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    for child_name, child in getattr(root, name, nn.Module()).named_children():
        module.add_module(child_name, child)
    root.add_module(name, module)
