from .loss import (
    DistillationLoss as DistillationLoss,
    LossWeights as LossWeights,
    Objective as Objective,
    distillation_loss as distillation_loss,
    register_objective as register_objective,
)
from .model import (
    Student as Student,
    load_student as load_student,
    tiny_student as tiny_student,
)
from .rows import (
    source_text as source_text,
    target_text as target_text,
    training_rows as training_rows,
)
from .examples import training_examples as training_examples
from .answers import (
    Answer as Answer,
    answer as answer,
    explain as explain,
)
