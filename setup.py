"""The packages of the distribution, by name; everything else about it is in pyproject.toml."""

from setuptools import setup

PACKAGES = [
    "export",
    "export.devices",
    "export.flavours",
    "export.lowbit",
    "export.parity",
    "export.writers",
    "qkd",
    "qkd.agents",
    "qkd.config",
    "qkd.data",
    "qkd.data.sets",
    "qkd.distill",
    "qkd.losses",
    "qkd.distill.methods",
    "qkd.foreign",
    "qkd.nets",
    "qkd.report",
    "qkd.search",
    "qkd.stages",
    "qkd.training",
    "quantizers",
    "quantizers.graph",
    "quantizers.graph.recording",
    "quantizers.graph.spelling",
    "quantizers.view",
]

setup(
    packages=[*PACKAGES, "qkd.configs"],
    package_dir={"qkd.configs": "configs"},  # shipped as data: `qkd run digits/w2a2` works from any folder
    package_data={"qkd.configs": ["**/*.yaml"], "export.lowbit": ["native/*"]},
    include_package_data=False,
)
