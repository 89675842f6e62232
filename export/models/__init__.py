"""One module per kind of ONNX file that is written: the student, its float twin, its int8 twin."""

__all__: list[str] = []
