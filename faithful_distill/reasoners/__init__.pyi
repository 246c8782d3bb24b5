from .protocol import (
    ByLikelihood as ByLikelihood,
    Reasoner as Reasoner,
    StudentReasoner as StudentReasoner,
    WrittenRationale as WrittenRationale,
    abilities as abilities,
    as_reasoner as as_reasoner,
    likeliest as likeliest,
)
