"""One module an operation: schema, fake kernel, autograd, choice of backend, and the public function of its name."""

import importlib
import pkgutil

# The operations: every module here that names its backends.
__all__: list[str] = []
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_") and hasattr(importlib.import_module(f".{_module.name}", __name__), "BACKENDS"):
        __all__.append(_module.name)
