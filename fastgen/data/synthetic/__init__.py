"""Rendered training data in exactly the schemas of the real tasks, for whoever has not got their images."""

from fastgen.data.synthetic.iclevr import OBJECTS, write_iclevr
from fastgen.data.synthetic.monsters import write_monsters

__all__ = ["OBJECTS", "write_iclevr", "write_monsters"]
