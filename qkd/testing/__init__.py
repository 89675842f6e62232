"""Small nets, images and configs for tests: realistic, but done in seconds."""

from qkd.testing.small import TinyNet, run_tiny, synthetic_images, synthetic_splits, tiny_config, write_npz_set

__all__ = ["TinyNet", "run_tiny", "synthetic_images", "synthetic_splits", "tiny_config", "write_npz_set"]
