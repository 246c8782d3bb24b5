"""Faithful chain-of-thought distillation: contrastive decoding, counterfactual training, and faithfulness one may believe."""
__version__ = "0.1.0"

# Public names and the room each lives in. Loaded on first use: importing the package costs nothing.
_rooms = {
    "questions": ["Question", "load_questions"],
    "decoding": ["contrastive_generate"],
    "rationales": ["rationalize"],
    "student": ["answer", "load_student"],
    "training": ["train_student"],
    "recipes": ["explain"],
    "faithfulness": ["las", "perturbation_drop", "refinement_gain", "swap_consistency", "early_answering_aoc"],
    "runs": ["run_notebook", "reproduce"],
    "scoring": ["score_rationales"],
}
_home = {name: room for room, names in _rooms.items() for name in names}
__all__ = sorted(_home)


def __getattr__(name):
    from importlib import import_module
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home[name]}"), name)


def __dir__(): return sorted([*globals(), *__all__])
