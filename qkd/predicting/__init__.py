"""Use of exported files: classes of single images, accuracy on a data set, and the one file that does it elsewhere."""

__all__: list[str] = []
