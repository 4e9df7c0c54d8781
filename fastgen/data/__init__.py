"""Training data: readers for the known formats, image loading, and synthetic stand-ins."""

from fastgen.data.dataset import Dataset, Example, split
from fastgen.data.readers import find_dataset, read_dataset

__all__ = ["Dataset", "Example", "find_dataset", "read_dataset", "split"]
