"""The teacher: contexts that differ in the answer alone, and the tokens that the answer makes plausible."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
