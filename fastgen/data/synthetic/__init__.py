"""Rendered training data in the schemas of the real tasks, for users who do not have their images."""

from fastgen.data.synthetic.iclevr import write_iclevr
from fastgen.data.synthetic.monsters import write_monsters

__all__ = ["write_iclevr", "write_monsters"]
