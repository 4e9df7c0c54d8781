"""Measurements, each a row beside its parity figure: `python -m benchmarks.<name>`."""
