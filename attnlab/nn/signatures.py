"""Signatures of classes that pass options on to their base."""

import functools
import inspect
from typing import Any

from attnlab.attention._dispatch.primitive import check_names


def show_shared_options(cls: type) -> None:
    """Shows a class's own options and those that it passes on to its base, if any, in one signature, for help and for
    configs, and refuses others by name."""
    init = cls.__init__  # type: ignore[misc]
    own = inspect.signature(init).parameters
    shared = inspect.signature(cls.__mro__[1].__init__).parameters  # type: ignore[misc]
    named = [option for option in own.values() if option.kind is not option.VAR_KEYWORD]
    if len(named) < len(own):
        named += [option for option in shared.values() if option.name not in own]
    known = {option.name for option in named}

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        check_names(cls.__name__, options, known)
        init(self, *args, **options)

    del checked.__wrapped__  # where gin would look for options
    checked.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[misc]
