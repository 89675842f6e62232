"""The low-bit network from ``prepare``: an fx graph of known modules, with paths like the float network's."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.layers import ActQuantizer, Probabilities, QuantConvBn2d, QuantLinearBn
from quantizers.records import require_same_grids
from quantizers.spec import QuantSpec


class Student(fx.GraphModule):
    """A low-bit network: an fx graph of only known modules, created by :func:`prepare`.

    Its parameters are float32 (or float64, for computation but not export). ``copy.deepcopy`` gives an independent
    student. To store one in a file, save ``student.state_dict()`` and prepare the float network again.
    """

    @property
    def tap_paths(self) -> dict[str, str]:
        """Module path of the float network -> path of the submodule here that gives the same (dequantized) output."""
        return self.meta["tap_paths"]  # type: ignore[no-any-return]

    @property
    def spec(self) -> QuantSpec:
        """Return the bits and quantizers the student was prepared with."""
        return self.meta["spec"]  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the student on a batch of images.

        Raises:
            ValueError: If images have another size than the student was prepared for.
        """
        for images in (*args, *kwargs.values()):
            if isinstance(images, Tensor):
                require_image_shape(self, tuple(images.shape))
        return super().__call__(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002 - torch's signature
        """Load a state like any module, but refuse one of other grids and load nothing then.

        Raises:
            RuntimeError: If the state has other widths or quantizers (names layers and both widths), or names or
                shapes do not match.
        """
        require_same_grids(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Student:  # noqa: FBT001, FBT002 - torch's
        changed = fn(torch.zeros((), dtype=torch.float32)).dtype
        if changed in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"a student cannot be made {changed}: its codes are exact only in float32; keep it in float32, train "
                "it under torch.autocast, and export it, which stores 2 to 8 bits"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __reduce__(self) -> Any:
        raise TypeError(
            "a student cannot be pickled, as torch.save(student) does; use torch.save(student.state_dict(), path) and "
            "later load_state_dict into quantizers.prepare(model, spec, example_inputs), or export_onnx(student, ...)"
        )

    def __copy__(self) -> Student:
        copied = Student(self, self.graph, class_name="Student")
        copied.meta = dict(self.meta)
        return copied


class PrepareWarning(UserWarning):
    """What the caller of :func:`prepare` should know of the network."""


def assemble(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    *,
    tap_paths: dict[str, str],
    spec: QuantSpec,
    image_shape: tuple[int, ...],
) -> Student:
    """Return the student that runs ``graph`` on ``modules`` (module path -> module).

    ``image_shape`` is the shape of one image, without the batch: windows, slices and conditions may depend on it.

    A softmax becomes :class:`~quantizers.layers.Probabilities`, which passes logits through in training mode.
    """
    root, moved = nn.Module(), _moved_apart(modules)
    for path, module in modules.items():
        _place(root, moved.get(path, path), _for_losses(module))
    for node in graph.nodes:
        node.target = moved.get(str(node.target), node.target)
    tap_paths = {path: moved.get(place, place) for path, place in tap_paths.items()}
    student = Student(root, graph, class_name="Student")
    student.meta.update(tap_paths=tap_paths, spec=spec, image_shape=image_shape)
    _introduce_neighbors(student)
    return student


def _introduce_neighbors(student: Student) -> None:
    """Tell each convolution which quantizer it reads, and which one reads it if that is the only reader."""
    called = [node for node in student.graph.nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in called)
    once = {node: student.get_submodule(str(node.target)) for node in called if calls[str(node.target)] == 1}
    for node, layer in once.items():
        if not isinstance(layer, QuantConvBn2d) or len(node.args) != 1:
            continue
        before, readers = once.get(node.args[0]), list(node.users)
        if isinstance(before, ActQuantizer):
            layer.read_from(before)
        reader = once.get(readers[0]) if len(readers) == 1 and len(readers[0].args) == 1 else None
        if isinstance(reader, ActQuantizer):
            layer.hand_to(reader)


def require_image_shape(student: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise unless a batch has images of the size that the student was prepared for.

    Sizes of windows, positions of slices and conditions on shapes were read for that size. On another one, the student
    may silently compute another function than the float network.

    Args:
        student: A network from :func:`prepare`.
        shape: Shape of the batch.

    Raises:
        ValueError: If it has another size, or no batch axis.
    """
    wanted = getattr(student, "meta", {}).get("image_shape")
    if wanted is None or tuple(shape[1:]) == tuple(wanted):
        return
    if tuple(shape) == tuple(wanted):
        raise ValueError(f"a single image of shape {tuple(shape)} is not a batch; add a batch axis, image[None]")
    raise ValueError(
        f"images of shape {tuple(shape[1:])}, but the student was prepared for {tuple(wanted)}, which its windows "
        "and slices depend on; give images of that size, or prepare(..., example_inputs=images of the new size)"
    )


def require_float(model: object, spec: object) -> None:
    """Raise unless given a float network and its bits.

    Raises:
        TypeError: If given something else, or if a part of the network is a student.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, such as QuantSpec(weight_bits=4, act_bits=4), got {spec!r:.40}")
    for path, module in model.named_modules():
        if isinstance(module, Student):
            raise TypeError(
                f"{path or 'model'}: is already a low-bit student; give prepare the float network that it was made from"
            )


def with_masks(student: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with masks of ones where it has none: in earlier versions, all weights of pruned layers trained.

    Args:
        student: A network from :func:`prepare`, or any other, whose state is returned unchanged.
        state: Its ``state_dict()``, perhaps of an earlier version.
    """
    masks = {f"{path}.mask": layer.mask for path, layer in quant_layers(student).items()}
    return {**{name: torch.ones_like(mask) for name, mask in masks.items() if mask is not None}, **state}


def require_student(student: object, function: str) -> None:
    """Raise unless a function got a student, or a module with layers of one.

    Args:
        student: What it got.
        function: Its name.

    Raises:
        TypeError: If it is something else, such as a float network.
    """
    kinds = (Student, ActQuantizer, QuantConvBn2d, QuantLinearBn)
    if not isinstance(student, nn.Module) or not any(isinstance(module, kinds) for module in student.modules()):
        raise not_a_student(student, function)


def not_a_student(found: object, function: str) -> TypeError:
    """Return the error of a function that takes a student and got something else.

    Args:
        found: What it got.
        function: Its name.
    """
    return TypeError(
        f"{function} takes a student that quantizers.prepare made, got {type(found).__name__}; call "
        "prepare(model, spec, example_inputs) first"
    )


def warn_of_frozen(model: nn.Module) -> None:
    """Warn the caller of :func:`prepare` once that a float network, and so its student, is entirely frozen."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        warnings.warn(
            f"every parameter of {type(model).__name__} is frozen (requires_grad=False), and so are the weights of its "
            "student: only activation scales will train. To train it, call model.requires_grad_(True) before prepare "
            "or student.requires_grad_(True) after it",
            PrepareWarning,
            stacklevel=3,
        )


def warn_of_computed(weights: Sequence[str]) -> None:
    """Warn the caller of :func:`prepare` once of learned tensors that the student holds as the network computes them.

    Args:
        weights: Their names, with the functions that compute them.
    """
    if weights:
        warnings.warn(
            f"the network computes {'; '.join(weights)} from its parameters, in every forward pass. Its student starts "
            "with the results as its weights, and trains them without these functions. To rule out any doubt, make "
            "them plain parameters before prepare (remove_parametrizations)",
            PrepareWarning,
            stacklevel=3,
        )


def _for_losses(module: nn.Module) -> nn.Module:
    if not isinstance(module, (nn.Softmax, nn.LogSoftmax)):
        return module
    axis = 1 if module.dim is None else int(module.dim)  # torch's own choice for two and four axes
    return Probabilities(axis, is_log=isinstance(module, nn.LogSoftmax))


def _moved_apart(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return new paths for modules that are within another one under the name of an attribute that it needs itself.

    A convolution of the float net with a child ``bn``, say, becomes a layer that holds its own batch norm there.
    """
    moved: dict[str, str] = {}
    for path in modules:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            parent = modules.get(".".join(path.split(".")[:depth]))
            while parent is not None and parts[depth] in dir(parent):
                parts[depth] += "_"
        new = ".".join(parts)
        while new != path and (new in modules or new in moved.values()):
            new += "_"
        if new != path:
            moved[path] = new
    return moved


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    for child_name, child in getattr(root, name, nn.Module()).named_children():
        module.add_module(child_name, child)
    root.add_module(name, module)


def act_quantizers(student: nn.Module) -> dict[str, ActQuantizer]:
    """Return the activation quantizers of a student, in network order.

    Args:
        student: A network from :func:`prepare`.

    Returns:
        Module path -> quantizer; empty for a network that was never prepared.
    """
    return {name: module for name, module in student.named_modules() if isinstance(module, ActQuantizer)}


def quant_layers(student: nn.Module) -> dict[str, QuantConvBn2d | QuantLinearBn]:
    """Return the low-bit layers of a student, in network order.

    Args:
        student: A network from :func:`prepare`.

    Returns:
        Module path -> layer; empty for a network that was never prepared.
    """
    kinds = (QuantConvBn2d, QuantLinearBn)
    return {name: module for name, module in student.named_modules() if isinstance(module, kinds)}
