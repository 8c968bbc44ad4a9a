"""Attention mechanisms in JAX, each in forms that agree, and controlled ablations of them.

The primitives are attributes of this package and need jax and einops alone; they are imported when one is first asked
for. The layers, models, data, training and ablations (attnlab.nn, .models, .data, .train, .ablate) need the extra
"experiments".
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attnlab.attention._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name != "attention" and not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}"):
            raise AttributeError(name)  # a module, which the statement that asks for it imports
        if name == "__all__":
            return _public_names()
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = vars(importlib.import_module("attnlab.attention._public"))
        globals().update({key: public[key] for key in _public_names()})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_public_names()})

    def _public_names() -> list[str]:
        public = vars(importlib.import_module("attnlab.attention._public"))
        return [name for name in public if not name.startswith("_")]
