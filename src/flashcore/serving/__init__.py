"""This room has what inference engines call: attention over caches of keys and values, in pages or
not, that grow with every step."""
