"""Checks of a config before anything runs, beyond its schema: known names, existing files."""

from qkd.checking.config_files import file_faults
from qkd.checking.config_names import name_faults, term_use_faults

__all__ = ["file_faults", "name_faults", "term_use_faults"]
