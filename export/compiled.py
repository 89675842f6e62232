"""The compiler that is there and the cache of compiled libraries, where earlier versions had them."""

from __future__ import annotations

from quantizers.native.building import cached_library, cpp_compiler

__all__ = ["cached_library", "cpp_compiler"]
