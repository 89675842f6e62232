"""Write functions and moves of values as ONNX nodes."""

from export.lowering.functions import FUNCTION_WRITERS, write_function
from export.lowering.moves import MOVE_WRITERS, write_move

__all__ = ["FUNCTION_WRITERS", "MOVE_WRITERS", "write_function", "write_move"]
