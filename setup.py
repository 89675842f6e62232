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
    "qkd.distill.losses",
    "qkd.distill.methods",
    "qkd.foreign",
    "qkd.losses",
    "qkd.methods",
    "qkd.methods.auxiliary",
    "qkd.methods.co_study",
    "qkd.methods.ensemble",
    "qkd.methods.meta_distil",
    "qkd.methods.peers",
    "qkd.methods.plain",
    "qkd.methods.rotations",
    "qkd.nets",
    "qkd.report",
    "qkd.roles",
    "qkd.search",
    "qkd.stages",
    "qkd.terms",
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
