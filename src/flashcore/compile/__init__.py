"""This package goes from a plan to machine code: the source text, NVRTC, the caches, the C++
compiler."""
