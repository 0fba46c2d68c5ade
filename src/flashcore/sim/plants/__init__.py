"""Planted bugs are text replacements on the kernels, so that the checks are checked."""
