"""Fake quantization on a CPU as C++ that is compiled once a machine, and the cache of such libraries."""

__all__: list[str] = []
