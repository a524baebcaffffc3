"""Fitting the maps that bring features of a quantised backbone near to those of a float one."""
