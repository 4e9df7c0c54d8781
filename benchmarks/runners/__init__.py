"""What opens and runs a side: `open_runner(opening) -> runner` with `generate(job, latents)`, see benchmarks/worker.py."""
