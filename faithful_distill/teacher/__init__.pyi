from .prompts import (
    block as block,
    context as context,
    demonstrations as demonstrations,
    few_shot as few_shot,
)
from .contrast import (
    Generation as Generation,
    Stop as Stop,
    reference_generate as reference_generate,
    stop_rule as stop_rule,
)
from .generate import contrastive_generate as contrastive_generate
from .custom_generate import contrastive as contrastive
from .strategy import Strategy as Strategy, as_strategy as as_strategy, strategies as strategies
from .selection import select_rationales as select_rationales
from .loading import Teacher as Teacher, load_teacher as load_teacher
from .texts import FunctionTeacher as FunctionTeacher, ServedTeacher as ServedTeacher, TextTeacher as TextTeacher
from .rationales import rationalize as rationalize
from .shards import merge_shards as merge_shards, rationalize_in_parts as rationalize_in_parts
