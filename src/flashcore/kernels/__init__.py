"""This package holds the kernels: each has a folder with its CUDA C++ text and its Python; the rest
they share."""
