"""The laboratory: a micro-world where the truth is known, notebooks run by key, grids, tables, plots and the report."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
