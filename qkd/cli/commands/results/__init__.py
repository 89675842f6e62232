"""Sub-commands about the results of runs: made images, classes of images, accuracy on a data set, runs side by side."""

__all__: list[str] = []
