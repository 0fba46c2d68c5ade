"""This folder makes the calls that commands are about, each in a module of its command's name, of
what the shell gives."""
