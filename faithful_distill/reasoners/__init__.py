"""Whatever writes a rationale and answers from it: students, prompted and chat models, functions."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
