"""Decides which grid each value of a float graph is on in the student, based on its readers."""

from __future__ import annotations

from torch import fx, nn

from quantizers.graph.folding import may_fold
from quantizers.graph.form.canonical import Affine
from quantizers.graph.form.kinds import (
    ADAPTIVE,
    ADD,
    AFFINE,
    AVGPOOL,
    CAT,
    COMPUTE,
    CONV,
    FUNCTION,
    FUNCTION_NAMES,
    MAXPOOL,
    MEAN,
    MUL,
    NORM,
    PASS,
    PLACEHOLDER,
    PRESERVING,
    RELU,
    UNSIGNED_FUNCTIONS,
)
from quantizers.graph.trace import RewriteError, Traced
from quantizers.integer import largest_safe_weight
from quantizers.spec import QuantSpec

Demand = tuple[str, int, "fx.Node | None"]  # ("compute" | "stream" | "cat", bits, the concatenation)


class Plan:
    """Where grids are, and how many bits they have.

    A value read only by convolutions and linear layers is on their grid. A value that sums, products or poolings
    also read is on the wider grid of sums, and the layers read a copy quantized to theirs.

    Args:
        traced: The float graph.
        spec: Bits and quantizers.

    Raises:
        RewriteError: If an override pattern matches no layer.
    """

    def __init__(self, traced: Traced, spec: QuantSpec) -> None:
        self.traced, self.spec = traced, spec
        self.folds: dict[fx.Node, list[fx.Node]] = {}  # layer -> what is folded into it, in order
        self.host: dict[fx.Node, fx.Node] = {}  # what is folded -> its layer
        for node in self.traced.graph.nodes:
            self._fold(node)
        self.folded = set(self.host)
        self.layer_bits = self._assign_layer_bits()
        self._demands: dict[fx.Node, frozenset[Demand]] = {}
        self._kinds: dict[fx.Node, str] = {}

    def _fold(self, node: fx.Node) -> None:
        """Fold a batch norm or an affine map into the layer that is the sole source of its input."""
        kind, source = node.meta["kind"], node.args[0] if node.args else None
        if kind not in (NORM, AFFINE) or not isinstance(source, fx.Node) or len(source.users) != 1:
            return
        layer = self.host.get(source, source)
        # A linear layer on more than two axes has its features last; norms and affine maps work on axis 1.
        on_channels = layer.meta["kind"] == CONV or (layer.meta["kind"] in COMPUTE and len(layer.meta["shape"]) == 2)
        if on_channels and self._may_fold(node, layer):
            self.folds.setdefault(layer, []).append(node)
            self.host[node] = layer

    def _may_fold(self, node: fx.Node, layer: fx.Node) -> bool:
        module = self.traced.module(node)
        norms = [self.traced.module(other) for other in self.folds.get(layer, []) if other.meta["kind"] == NORM]
        if isinstance(module, Affine):
            return may_fold(module, self.traced.module(layer), *norms)  # type: ignore[arg-type]
        return not norms

    def root(self, layer: fx.Node) -> fx.Node:
        """Return the node whose value a layer outputs: the last one folded into it, or the layer itself."""
        return self.folds[layer][-1] if layer in self.folds else layer

    def is_absorbed(self, node: fx.Node) -> bool:
        """Return whether the student never computes a node's value, because more is folded into its layer."""
        layer = self.host.get(node, node)
        return layer in self.folds and self.root(layer) is not node

    def _assign_layer_bits(self) -> dict[fx.Node, tuple[int, int]]:
        layers = [n for n in self.traced.graph.nodes if n.meta["kind"] in COMPUTE]
        names = [self.traced.path(n) for n in layers]
        unused = self.spec.unused_overrides(names)
        if unused:
            raise RewriteError(f"overrides {unused} match no layer; the layers are: {', '.join(names)}")
        return {
            n: self.spec.layer_bits(self.traced.path(n), is_first=_reaches(n, up=True), is_last=_reaches(n, up=False))
            for n in layers
        }

    # -- what the readers want -------------------------------------------------------------------------------------

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that read the value of ``node`` (a folded batch norm's readers are its layer's)."""
        users: list[fx.Node] = []
        for user in node.users:
            users.extend(self.readers(user) if user in self.folded else [user])
        return users

    def demands(self, node: fx.Node) -> frozenset[Demand]:
        """Return the grids that the readers of a value need, looking through operations that only move values."""
        if node not in self._demands:
            self._demands[node] = frozenset(d for user in self.readers(node) for d in self._demand_of(user))
        return self._demands[node]

    def _demand_of(self, user: fx.Node) -> frozenset[Demand]:
        kind = user.meta["kind"]
        if kind in COMPUTE:
            return frozenset({("compute", self.layer_bits[user][1], None)})
        if kind in (ADD, MUL, AVGPOOL, MEAN, FUNCTION, NORM, AFFINE) or (kind == ADAPTIVE and not _is_identity(user)):
            return frozenset({("stream", self.spec.sum_bits, None)})
        if kind == CAT:
            return frozenset({("cat", 0, user)})
        if kind in PRESERVING or kind == ADAPTIVE:
            return self.demands(user)
        return frozenset()

    def rectifiers(self, node: fx.Node) -> list[fx.Node]:
        """Return the ReLUs that alone read a value, all through operations that only move values."""
        users = self.readers(node)
        if not users or all(user.meta["kind"] == RELU for user in users):
            return []
        found: list[fx.Node] = []
        for user in users:
            kind = user.meta["kind"]
            inner = [user] if kind == RELU else self._moved_rectifiers(user) if kind in (MAXPOOL, PASS) else []
            if not inner:
                return []
            found.extend(inner)
        return found

    def _moved_rectifiers(self, node: fx.Node) -> list[fx.Node]:
        users = self.readers(node)
        if users and all(user.meta["kind"] == RELU for user in users):
            return users
        return self.rectifiers(node)

    # -- the decisions ---------------------------------------------------------------------------------------------

    def bits(self, node: fx.Node) -> int | None:
        """Return the bits of a value's grid, or None if it stays real."""
        demands = self.demands(node)
        if not demands:
            moved = self.rectifiers(node)
            widths = [bits for bits in (self.bits(relu) for relu in moved) if bits is not None]
            return max(widths) if widths else None
        own = [bits for what, bits, _ in demands if what != "cat"]
        if own:
            return max(own)
        widths = [self.bits(cat) or self.spec.sum_bits for _, _, cat in demands if cat is not None]
        # A rectified value that cannot be on their grid keeps its own, wide enough to be requantized to theirs.
        return max([*widths, self.spec.sum_bits] if self._keeps_its_grid(node) else widths)

    def _keeps_its_grid(self, node: fx.Node) -> bool:
        """Return whether the grid of concatenations extends below zero, where that of a value must not.

        The clip at zero of an unsigned grid is the ReLU, so a grid that extends below zero would lose it.
        """
        if node.meta["kind"] != RELU and not self.rectifiers(node):
            return False
        cats = {cat for what, _, cat in self.demands(node) if what == "cat" and cat is not None}
        return any(self.kind(cat) != "unsigned" for cat in cats)

    def cats(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return the concatenations whose grid a value can share: its only readers, all of one bit width."""
        demands = self.demands(node)
        cats = {cat for what, _, cat in demands if what == "cat" and cat is not None}
        if (
            len(cats) != len(demands)
            or self._keeps_its_grid(node)
            or len({(self.bits(cat) or self.spec.sum_bits, self.kind(cat)) for cat in cats}) > 1
        ):
            return frozenset()
        return frozenset(cats)

    def method(self, node: fx.Node, bits: int) -> str:
        """Return the activation quantizer: the configured one if only low-bit layers read the value, else LSQ."""
        only_layers = all(what == "compute" for what, _, _ in self.demands(node))
        return self.spec.act_quantizer if only_layers and bits < 8 and node.meta["kind"] != PLACEHOLDER else "lsq"

    def kind(self, node: fx.Node) -> str:
        """Return the kind of a value's grid: ``unsigned``, ``signed`` or ``shifted``."""
        if node not in self._kinds:
            cats = self.cats(node) if node.meta["kind"] != CAT else frozenset()
            self._kinds[node] = self.kind(next(iter(cats))) if cats else self._natural_kind(node)
        return self._kinds[node]

    def _natural_kind(self, node: fx.Node) -> str:
        kind = node.meta["kind"]
        uneven = "signed" if self.spec.symmetric else "shifted"  # for values that extend further on one side of zero
        if kind == RELU or self.rectifiers(node):
            return "unsigned"
        if kind == PLACEHOLDER:
            return uneven
        if kind == FUNCTION:
            return "unsigned" if self.function_name(node) in UNSIGNED_FUNCTIONS else uneven
        if kind in (ADD, MUL, CAT, AVGPOOL, MEAN, ADAPTIVE, *PRESERVING):
            kinds = {self._natural_kind(n) for n in node.all_input_nodes}
            return "unsigned" if kinds == {"unsigned"} else "signed"
        return "signed"

    def function_name(self, node: fx.Node) -> str:
        """Return the name of a real function in the integer view."""
        module = self.traced.module(node)
        return FUNCTION_NAMES[type(module)]  # type: ignore[index]

    def largest(self, node: fx.Node) -> float | None:
        """Return the upper bound that the float net's own activation puts on a value, or None."""
        bounds = [self.bound(relu) for relu in self.rectifiers(node) or [node]]
        known = [bound for bound in bounds if bound is not None]
        return max(known) if len(known) == len(bounds) else None

    def bound(self, node: fx.Node) -> float | None:
        """Return the upper bound that a node itself puts on its values, or None."""
        module = self.traced.module(node)
        is_bounded = node.meta["kind"] == RELU and isinstance(module, nn.Hardtanh)  # ReLU6 is one
        return float(module.max_val) if is_bounded else None  # type: ignore[union-attr, arg-type]


def _is_identity(node: fx.Node) -> bool:
    return bool(node.args[0].meta["shape"] == node.meta["shape"])  # type: ignore[union-attr]


def _reaches(layer: fx.Node, *, up: bool) -> bool:
    """Return whether ``layer`` reaches the image (up) or the output (down) without passing another layer."""
    seen: set[fx.Node] = set()
    front = list(layer.all_input_nodes if up else layer.users)
    while front:
        node = front.pop()
        if node in seen or node.meta["kind"] in COMPUTE:
            continue
        seen.add(node)
        if node.op == ("placeholder" if up else "output"):
            return True
        front.extend(node.all_input_nodes if up else node.users)
    return False


def weight_range(weight_bits: int, act_bits: int, method: str) -> dict[str, int]:
    """Return narrower code bounds where 16-bit pair sums would overflow: 8-bit weights on 8-bit activations."""
    full = 2 ** (weight_bits - 1)
    bound = largest_safe_weight(2**act_bits - 1)
    if method != "lsq" or full <= bound:
        return {}
    bound = 2 ** (bound.bit_length() - 1)
    return {"low": -bound, "high": bound - 1}
