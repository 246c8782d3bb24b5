from .protocol import (
    ByLikelihood as ByLikelihood,
    Reasoner as Reasoner,
    StudentReasoner as StudentReasoner,
    WrittenRationale as WrittenRationale,
    abilities as abilities,
    as_reasoner as as_reasoner,
    likeliest as likeliest,
)
from .styles import (
    Chat as Chat,
    Style as Style,
    Think as Think,
    Worked as Worked,
    make_style as make_style,
    styles as styles,
)
from .causal import CausalReasoner as CausalReasoner
from .cached import CachedReasoner as CachedReasoner
from .opening import open_reasoner as open_reasoner, register_reasoner as register_reasoner
from .served import ServedReasoner as ServedReasoner
