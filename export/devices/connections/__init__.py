"""Ways to a device: addresses, shells, ssh, adb, and what a device may answer."""

__all__: list[str] = []
