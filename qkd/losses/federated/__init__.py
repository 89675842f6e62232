"""Losses of federated distillation: of the latent generator, of clients that follow it, and of clients held back."""

__all__: list[str] = []
