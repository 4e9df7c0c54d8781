"""Rendered training data in exactly the schemas of the real tasks, for whoever has not got their images."""

from fastgen.data.synthetic.iclevr import write_iclevr
from fastgen.data.synthetic.label_lists import OBJECTS
from fastgen.data.synthetic.monsters import write_monsters

__all__ = ["OBJECTS", "write_iclevr", "write_monsters"]
