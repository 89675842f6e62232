"""Parts of a training step that several modules of a student do together, on a CPU and in channels_last."""

__all__: list[str] = []
