"""Faithful chain-of-thought distillation, with confidence intervals and null checks.

The public names stand in `__init__.pyi`, where editors and type checkers find them too. Each is loaded when it is first used, so importing
the package costs nothing."""
__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
