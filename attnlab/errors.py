"""The exceptions that the command line prints as one line."""


class UserError(ValueError):
    """Bad input from outside: a file, a config, a folder. Exit status 2."""


class OwnedError(UserError):
    """The folder is in use by another process."""


class RunError(RuntimeError):
    """A run stopped for a reason outside it, such as a full disk. Exit status 1; what it kept stays."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of a device."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    )
