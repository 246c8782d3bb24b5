"""Metrics of faithfulness as functions of arrays, and what produces those arrays."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
