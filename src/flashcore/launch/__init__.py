"""This package makes launches: arguments, descriptors, memory for results, the driver."""
