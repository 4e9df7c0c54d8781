"""The networks of both families as PyTorch modules with the interfaces of `models.signatures`."""
