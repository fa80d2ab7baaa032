"""The commands of the command line, a file each: a dataclass of its options, with a `run`."""
