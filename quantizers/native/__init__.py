"""Fake quantization on a CPU as C++ that is compiled once per machine, and the cache of such libraries."""

__all__: list[str] = []
