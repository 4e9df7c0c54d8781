"""What a model is on disk: its folder or bundle, its spec, its networks, and how one is found or imported."""
