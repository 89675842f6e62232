"""The version of this distribution."""

from qkd.machine import own_version

__version__ = own_version()
