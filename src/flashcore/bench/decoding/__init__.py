"""This room holds how decoding is timed: over which caches, what, and in which tables it stands."""
