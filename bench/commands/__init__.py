"""The bodies of the subcommands, grouped by what they answer."""
