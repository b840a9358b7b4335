"""The subcommands of `nemo-spin`: a module each, with `add_parser`, which also says what runs.

They are all imported to show the usage, so what is slow to import is imported by the functions that need it.
"""
