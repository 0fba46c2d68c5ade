"""This package is `flashcore isolate`: the stages of a kernel in order, and the first wrong
value."""
