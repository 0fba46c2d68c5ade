"""This package checks results: the float64 oracle, the error rule, random calls."""
