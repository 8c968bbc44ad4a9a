"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input from outside: a file, a config, a folder. The command line prints its message as one line."""
