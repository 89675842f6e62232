"""The packages of the distribution, by name; everything else about it is in pyproject.toml."""

from setuptools import setup

PACKAGES = [
    "export",
    "export.conversion",
    "export.cost",
    "export.devices",
    "export.devices.connections",
    "export.devices.onboard",
    "export.flavours",
    "export.graph",
    "export.lowbit",
    "export.lowering",
    "export.models",
    "export.parity",
    "export.passes",
    "export.storage",
    "qkd",
    "qkd.agents",
    "qkd.agents.operations",
    "qkd.agents.policies",
    "qkd.config",
    "qkd.data",
    "qkd.data.loading",
    "qkd.data.sets",
    "qkd.distill",
    "qkd.distill.losses",
    "qkd.distill.methods",
    "qkd.files",
    "qkd.foreign",
    "qkd.nets",
    "qkd.pipeline",
    "qkd.report",
    "qkd.run",
    "qkd.search",
    "qkd.stages",
    "qkd.training",
    "quantizers",
    "quantizers.graph",
    "quantizers.graph.form",
    "quantizers.graph.recording",
    "quantizers.graph.spelling",
    "quantizers.view",
]

setup(
    packages=[*PACKAGES, "qkd.configs"],
    package_dir={"qkd.configs": "configs"},  # shipped as data: `qkd run digits/w2a2` works from any folder
    package_data={"qkd.configs": ["**/*.yaml"], "export.lowbit": ["native/*"], "qkd.report": ["*.j2"]},
    include_package_data=False,
)
