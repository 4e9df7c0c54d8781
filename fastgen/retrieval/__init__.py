"""Retrieval: an index of a training set by its texts, and the training latents that images start from (RAG init)."""
