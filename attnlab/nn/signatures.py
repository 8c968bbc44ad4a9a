"""Signatures of classes that pass options on to their base."""

import inspect


def show_shared_options(cls: type) -> None:
    """Shows a class's own options and those it passes on to its base in one signature, for help and for configs."""
    own = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    shared = inspect.signature(cls.__mro__[1].__init__).parameters  # type: ignore[misc]
    named = [option for option in own.values() if option.kind is not option.VAR_KEYWORD]
    named += [option for option in shared.values() if option.name not in own]
    cls.__init__.__signature__ = inspect.Signature(named)  # type: ignore[misc]
