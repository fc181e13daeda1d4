"""What the subcommands do: a dataclass each, whose fields are its flags and whose `run` does it."""
