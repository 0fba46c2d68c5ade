"""A launch: arguments, descriptors, memory for results, the driver."""
