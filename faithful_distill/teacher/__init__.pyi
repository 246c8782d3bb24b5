from .prompts import (
    block as block,
    context as context,
    demonstrations as demonstrations,
    few_shot as few_shot,
)
from .contrast import (
    Generation as Generation,
    Stop as Stop,
    contrast as contrast,
    reference_generate as reference_generate,
    stop_rule as stop_rule,
)
from .generate import contrastive_generate as contrastive_generate
from .rationales import (
    Strategy as Strategy,
    Teacher as Teacher,
    load_teacher as load_teacher,
    merge_shards as merge_shards,
    rationalize as rationalize,
    rationalize_in_parts as rationalize_in_parts,
    strategies as strategies,
)
