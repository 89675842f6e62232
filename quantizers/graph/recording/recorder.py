"""Runs a network once and records, as canonical modules, what it computes from its images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantizers.graph.form.kinds import is_stochastic_depth
from quantizers.graph.form.refusal import NoSpelling, RewriteError, failure, unknown
from quantizers.graph.recording.effective import EffectiveWeights
from quantizers.graph.recording.gradients import GradientFlow, without_checkpoints
from quantizers.graph.recording.interception import (
    FunctionCalls,
    OperatorCalls,
    by_name,
    instrumented,
    remembered,
    unrecorded,
    word_of,
)
from quantizers.graph.recording.ledger import Ledger, Region, geometry, memory_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.recording.outside import (
    OtherDice,
    inference_message,
    is_number,
    leaving,
    number_message,
    one_thread,
    reshaped_message,
    written_message,
)
from quantizers.graph.recording.returned import structure
from quantizers.graph.recording.steps import require_same_step
from quantizers.graph.spelling.call import Call, spelled
from quantizers.graph.spelling.layers import batch_norm
from quantizers.graph.spelling.moves import PIECES, VIEWS, view_moves
from quantizers.graph.spelling.pen import KNOWN_LAYERS, Pen, Value
from quantizers.graph.spelling.sites import stochastic_depth_of, user_site
from quantizers.graph.spelling.table import (
    BATCH_NORMS,
    DROPOUT_MODULES,
    FUNCTIONS,
    OPERATORS,
    SHAPE_ONLY,
    named,
)
from quantizers.graph.spelling.writes import mutated


class Recorder:
    """Records one run of a network.

    Args:
        root: The network, in the mode to record; a private copy, because its modules are instrumented during the run.
        check: Whether to compare every step with what torch computes.
        gradients: Whether the network has gradients; their stops are recorded in training mode.
    """

    def __init__(self, root: nn.Module, *, check: bool = True, gradients: bool = False) -> None:
        self.root, self.check, self.ledger = root, check, Ledger(root)
        self.weights = EffectiveWeights(self.ledger)
        self.pen = Pen(self.ledger, self.weights)
        self.flow = GradientFlow(self.pen, is_followed=gradients and root.training)
        self.outputs: dict[str, fx.Node] = {}
        self.paused, self.dice = False, OtherDice(root)
        self.refusal: RewriteError | None = None  # the first; the network may have caught it
        self._failed_in: str | None = None

    def run(self, images: Tensor, name: str) -> Recording:
        """Run the network on ``images`` and return what it computed.

        Raises:
            RewriteError: If it fails, takes a number or decision from values, or returns something else than tensors.
        """
        value = self.pen.images(name, images)
        self.ledger.bind(images, value)
        eager, flow = torch.compiler.set_stance("force_eager"), self.flow.followed(self._is_own_code)
        with torch.no_grad(), instrumented(self.root, self._scoped), eager, without_checkpoints():
            try:
                with flow, one_thread(self._refusal), OperatorCalls(self), FunctionCalls(self):
                    result = self.root(images)
                self.dice.require_unmoved(type(self.root).__name__)
            except RewriteError:
                raise
            except Exception as error:
                where = self._failed_in or self._place()
                raise RewriteError(failure(where, error, self.root, images.dim())) from error
        if self.refusal is not None:
            raise self.refusal
        self.pen.output(self._returned(result))
        self.pen.graph.lint()
        return Recording(self.pen.graph, self.pen.modules, self.outputs, result)

    @unrecorded
    def _returned(self, result: Any) -> Any:
        def node_of(tensor: Tensor) -> fx.Node | None:
            return self._value(tensor).node if self.ledger.is_traced(tensor) else None

        return structure(result, type(self.root).__name__, node_of)

    def _is_own_code(self) -> bool:
        """Return whether the network's own code runs, and not torch's or this package's."""
        return not (self.paused or self.pen.word)

    # -- modules ---------------------------------------------------------------------------------------------------

    @remembered
    def _scoped(self, path: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if is_stochastic_depth(module) and self._depends((args, kwargs)):
            return self._dropped(path, module, args[0] if args else next(iter(kwargs.values())))
        self.dice.require_unmoved(self._place())
        self.pen.scopes.append((path, module))
        try:
            result = forward(*args, **kwargs)
            self.dice.require_unmoved(path)
            self._note_output(path, result)
            return result
        except Exception:
            self._failed_in = self._failed_in or path
            raise
        finally:
            self.pen.scopes.pop()

    def _dropped(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        self.pen.scopes.append((path, module))
        try:
            return self._drop(module, x, is_on=module.training, in_place=False)  # type: ignore[no-any-return]
        finally:
            self.pen.scopes.pop()

    @unrecorded
    def _note_output(self, path: str, result: Any) -> None:
        if isinstance(result, Tensor):
            region = self.ledger.region(result)
            if region is not None and region.memory.node is not None:
                self.outputs[path] = self.ledger.read(self.pen, region).node  # type: ignore[union-attr]

    @unrecorded
    def _drop(self, module: nn.Module, x: Tensor, *, is_on: bool, in_place: bool) -> Tensor:
        """Record drop-out, which is not applied; where it is off, it returns its input."""
        value = self._value(x)
        if not is_on:
            if self.pen.scope:
                self.outputs[self.pen.scope] = value.node
            return x
        if not self.root.training:
            raise RewriteError(
                f"{self.pen.place()}: is on in eval(), too, so the network draws random numbers when it is deployed; "
                "pass training=self.training"
            )
        made = self.pen.emit(module, value)
        if self.pen.scope:
            self.outputs[self.pen.scope] = made.node
        if in_place:
            self.ledger.write(self.pen, self.ledger.region(x), made)  # type: ignore[arg-type]
            return x
        result = x.clone()
        self.ledger.bind(result, made)
        return result

    # -- Python functions ------------------------------------------------------------------------------------------

    @remembered
    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of torch's Python interface."""
        if self.paused:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__set__" and (name := self.ledger.learned_name(args[0])) is not None:
            raise RewriteError(written_message(self._place(), name))
        if self.flow.handles(func):
            return self.flow.call(func, args, depends=self._depends(args))
        outer, self.pen.word = self.pen.word, self.pen.word or word_of(func)
        try:
            if (reason := leaving(func, args, self._place())) and self._depends((args, kwargs)):
                raise RewriteError(reason)
            spelled = self._whole_function(func)
            if spelled is not None and self._depends((args, kwargs)):
                result = spelled(func, args, kwargs)
                self._note_flow(result, (args, kwargs))
                return result
            return func(*args, **kwargs)
        finally:
            self.pen.word = outer

    def _whole_function(self, func: Any) -> Callable[..., Any] | None:
        try:
            if func in DROPOUT_MODULES:
                return self._dropout
            if func in BATCH_NORMS:
                return self._batch_norm
            return self._function if func in FUNCTIONS else None
        except TypeError:  # not hashable
            return None

    def _dropout(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_plain = func.__module__ == "torch.nn.functional"
        defaults = {"p": 0.5, "training": True, "inplace": False} if is_plain else {}
        given = {**defaults, **dict(zip(("input", "p", "training", "inplace"), args, strict=False)), **kwargs}
        is_on = bool(given.get("training", given.get("train")))
        in_place = bool(given.get("inplace", False)) or func.__name__.endswith("_")
        module = DROPOUT_MODULES[func](float(given["p"]))
        return self._drop(module, given["input"], is_on=is_on, in_place=in_place)

    @unrecorded
    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        given = {**defaults, **dict(zip(BATCH_NORMS[func], args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if name not in ("cudnn_enabled",)}
        of_batch = bool(given.pop("training"))
        module = self.pen.scopes[-1][1] if self.pen.scopes else None
        if given["running_mean"] is None or (of_batch and not self.root.training):
            given["running_mean"] = given["running_var"] = None
            real = torch.nn.functional.batch_norm(**given, training=True)
        else:
            real = torch.nn.functional.batch_norm(**given)
        is_fixed = self.root.training and not of_batch

        def spell(pen: Pen, call: Call) -> Value:
            value = batch_norm(pen, call, module=module)
            norm = value.node if pen.module_of(value) is not None and len(call.shape) != 3 else value.node.args[0]
            norm.meta["is_fixed"] = is_fixed  # type: ignore[union-attr]
            return value

        self._spell(spell, "batch_norm", self._valued(given), (real,))
        return real

    def _function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, parameters, _ = FUNCTIONS[func]
        given = named(parameters, args, kwargs)
        if name == "conv2d" and not isinstance(given["padding"], str):
            return func(*args, **kwargs)  # its ATen form is just as good
        if name == "_pad_circular" and given["mode"] != "circular":
            return func(*args, **kwargs)
        return self._spelled_whole(func, args, kwargs)

    @unrecorded
    def _spelled_whole(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, parameters, speller = FUNCTIONS[func]
        given = named(parameters, args, kwargs)
        real = func(*args, **kwargs)
        results = tuple(item for item in pytree.tree_leaves(real) if isinstance(item, Tensor))
        self._spell(speller, name, self._valued(given), results)
        return real

    # -- ATen operations -------------------------------------------------------------------------------------------

    @remembered
    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an ATen operation."""
        name = func.overloadpacket.__name__
        if self.paused or name == "_assert_async":
            return func(*args, **kwargs)
        if (written := self._written_parameter(func, args)) is not None:
            raise RewriteError(written_message(self._place(), written))
        outer, self.pen.word = self.pen.word, self.pen.word or name
        try:
            if name in SHAPE_ONLY or not self._depends((args, kwargs)):
                return self._constant(func, name, args, kwargs)
            if is_number(func, name):
                raise RewriteError(number_message(self._place()))
            if torch.is_inference_mode_enabled():
                raise RewriteError(inference_message(self._place()))
            result = self._traced(func, name, args, kwargs)
            self._note_flow(result, (args, kwargs), name)
            return result
        finally:
            self.pen.word = outer

    @unrecorded
    def _written_parameter(self, func: Any, args: tuple[Any, ...]) -> str | None:
        return self.ledger.written_parameter(func, args)

    def _refusal(self, reason: str) -> RewriteError:
        self.refusal = self.refusal or RewriteError(f"{self._place()}: {reason}")
        return self.refusal

    def _note_flow(self, result: Any, arguments: Any, name: str = "") -> None:
        made, read = ([t for t in pytree.tree_leaves(x) if isinstance(t, Tensor)] for x in (result, arguments))
        self.flow.made(made, read, is_detached=name == "detach", is_view=name in VIEWS or name in PIECES)

    def _place(self) -> str:
        return self.pen.scope or type(self.root).__name__

    @unrecorded
    def _constant(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]
        sources = [] if name in SHAPE_ONLY else [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if is_number(func, name) and any(self.ledger.constant(source).random for source in sources):
            raise RewriteError(number_message(self._place(), of_chance=True))
        function = self.pen.word if self.weights.computed(func, name, args, kwargs, made) else ""
        self.ledger.derive(sources, made, random=torch.Tag.nondeterministic_seeded in func.tags, function=function)
        if sources and (name in VIEWS or name in PIECES):
            self._note_views(func, name, args, kwargs, made)
        return result

    def _note_views(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]
    ) -> None:
        """Note views of constants: a later write may make them depend on the images."""
        base = args[0]
        if not isinstance(base, Tensor) or memory_of(made[0]) != memory_of(base):
            return
        arguments = by_name(func, args, kwargs)
        call = Call(name, arguments, tuple(tuple(item.shape) for item in made))
        for number, item in enumerate(made):
            self.ledger.view(
                item, base, functools.partial(lambda c, s, n: view_moves(c, s)[n], call, tuple(base.shape), number)
            )

    @unrecorded
    def _traced(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mul" and (depth := stochastic_depth_of()) is not None:
            return self._drop(depth, args[0], is_on=True, in_place=False)
        arguments = by_name(func, args, kwargs)
        written = [
            argument.name for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]  # fmt: skip
        if written:
            return self._in_place(func, name, args, kwargs, arguments, written)
        is_view = name in VIEWS or name in PIECES
        values = self._valued(arguments, is_view=is_view)
        real = func(*args, **kwargs)
        results = tuple(item for item in pytree.tree_leaves(real) if isinstance(item, Tensor))
        if is_view and isinstance(values.get("self"), Value):
            self._view(name, arguments["self"], values, results)
        else:
            self._spell(OPERATORS.get(name), name, values, results)
        return real

    def _view(self, name: str, base: Tensor, values: dict[str, Any], results: tuple[Tensor, ...]) -> None:
        call = Call(name, values, tuple(tuple(item.shape) for item in results))
        try:
            if "refused" in values["self"].node.meta:
                raise NoSpelling
            chains = view_moves(call, tuple(base.shape))
            shares = memory_of(results[0]) == memory_of(base)
            for result, chain in zip(results, chains, strict=True):
                value = values["self"]
                for move in chain:
                    value = self.pen.emit(move, value, aside=move is not chain[-1])
                if shares:
                    self.ledger.view(result, base, functools.partial(list, chain), value.node)
                else:
                    self.ledger.bind(result, value)
        except NoSpelling as refusal:
            self._refuse(refusal, name, values, results)

    def _in_place(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any],
        written: list[str],
    ) -> Any:  # fmt: skip
        target = arguments[written[0]]
        if not isinstance(target, Tensor):
            raise RewriteError(self._message(NoSpelling("it writes into several tensors; write one by one"), name))
        region = self.ledger.hold(target)
        values = self._valued(arguments)
        try:
            if written != ["self"]:
                raise NoSpelling("it writes into another tensor (out=); use its return value")
            part = mutated(self.pen, name.removesuffix("_"), values, target)
            self.ledger.write(self.pen, region, part)
            message = None
        except NoSpelling as refusal:
            message = self._message(refusal, name.removesuffix("_"))
        before, real = geometry(target), func(*args, **kwargs)
        if geometry(target) != before:  # the ledger would not know it any more, and take it for a constant
            is_own = self.pen.layer is None  # in a layer of torch, the layer is what has no low-bit form
            raise RewriteError(self._message(NoSpelling(reshaped_message(name), bare=is_own), name))
        if message is not None:
            operands = [v for v in pytree.tree_leaves(values) if isinstance(v, Value)]
            self._poison(region, self.pen.refuse(target, message, *operands))
        elif self.check and isinstance(part, Value):
            require_same_step(self.pen, target, part)
        return real

    def _poison(self, region: Region, value: Value) -> None:
        """Mark all of a tensor's memory as refused: what was written there has no spelling."""
        while region.parent is not None:
            region = region.parent
        region.memory.node, region.memory.version = value.node, region.memory.version + 1

    # -- spelling --------------------------------------------------------------------------------------------------

    def _spell(
        self, speller: Callable[[Pen, Call], Any] | None, name: str, values: dict[str, Any], results: tuple[Tensor, ...]
    ) -> None:
        """Bind results to what the speller writes for them, or to a refusal."""
        call = Call(name, values, tuple(tuple(item.shape) for item in results))
        try:
            operands = [v for v in pytree.tree_leaves(values) if isinstance(v, Value)]
            if speller is None or any("refused" in operand.node.meta for operand in operands):
                raise NoSpelling
            made = spelled(speller, self.pen, call)
        except NoSpelling as refusal:
            self._refuse(refusal, name, values, results)
            return
        if self.check:
            require_same_step(self.pen, results[0], made)
        self.ledger.bind(results[0], made)
        for extra in results[1:]:
            reason = NoSpelling("pooling with indices has no integer kernel; use plain pooling", bare=True)
            self.ledger.bind(extra, self.pen.refuse(extra, self._message(reason, name), made))

    def _refuse(self, refusal: NoSpelling, name: str, values: dict[str, Any], results: tuple[Tensor, ...]) -> None:
        message = self._message(refusal, name)
        operands = [v for v in pytree.tree_leaves(values) if isinstance(v, Value)]
        for result in results:
            self.ledger.bind(result, self.pen.refuse(result, message, *operands))

    def _message(self, refusal: NoSpelling, name: str) -> str:
        place, what, site = self.pen.place(), self.pen.what(), user_site()
        where = f"{place} ({site})" if site and self.pen.layer is None else place
        is_known = isinstance(self.pen.layer, KNOWN_LAYERS)
        if self.pen.layer is not None and not is_known and not refusal.bare:
            return f"{where}: {unknown(what, type(self.pen.layer).__name__)}"
        if refusal.bare:
            return f"{where}: {refusal.reason}"
        if refusal.reason:
            return f"{where}: {what} has no low-bit form: {refusal.reason}"
        return f"{where}: {unknown(what, name)}"

    # -- tensors ---------------------------------------------------------------------------------------------------

    @unrecorded
    def _depends(self, arguments: Any) -> bool:
        return any(isinstance(item, Tensor) and self.ledger.is_traced(item) for item in pytree.tree_leaves(arguments))

    def _value(self, tensor: Tensor, *, is_view: bool = False) -> Value:
        region = self.ledger.region(tensor)
        value = self.ledger.read(self.pen, region) if region is not None else None
        if not isinstance(value, Value):
            raise TypeError("a constant has no node")
        return value if is_view else self.flow.stopped(tensor, value)

    @unrecorded
    def _valued(self, arguments: dict[str, Any], *, is_view: bool = False) -> dict[str, Any]:
        """Return arguments with values in place of the tensors that depend on the images."""

        def value(tensor: Tensor) -> Value | Tensor:
            return self._value(tensor, is_view=is_view) if self.ledger.is_traced(tensor) else tensor

        return {name: pytree.tree_map_only(Tensor, value, given) for name, given in arguments.items()}
