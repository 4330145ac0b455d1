"""A static page of figures drawn from finished runs: the command `rcml-report`.

Three steps, kept apart: arrays are collected from work directories and saved; figures are drawn
from the saved arrays alone; a page links figures and arrays.
"""
