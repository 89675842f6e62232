"""What a network costs: parameters, multiply-accumulates, bit operations, bytes."""

from export.cost.counting import (
    CostReport,
    LayerCost,
    Totals,
    cost_of_file,
    cost_of_program,
    cost_of_student,
    cost_of_view,
)

__all__ = [
    "CostReport",
    "LayerCost",
    "Totals",
    "cost_of_file",
    "cost_of_program",
    "cost_of_student",
    "cost_of_view",
]
