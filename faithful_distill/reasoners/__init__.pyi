from .protocol import (
    Reasoner as Reasoner,
    StudentReasoner as StudentReasoner,
    WrittenRationale as WrittenRationale,
    abilities as abilities,
    as_reasoner as as_reasoner,
)
