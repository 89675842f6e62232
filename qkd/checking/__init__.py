"""What a config can be told before anything runs, beyond its schema: names that tables know, files that are there."""

from qkd.checking.config_files import file_faults
from qkd.checking.config_names import name_faults

__all__ = ["file_faults", "name_faults"]
