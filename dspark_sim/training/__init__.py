"""Training drafters (torch): self-synthesised text, losses, the trainer."""
