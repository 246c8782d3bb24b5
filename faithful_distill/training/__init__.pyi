from .settings import (
    Settings as Settings,
    recipe as recipe,
    recipes as recipes,
)
from .train import TrainingResult as TrainingResult, train_student as train_student
from .launch import launch as launch, train_seeds as train_seeds
from .sizing import (
    dry_run as dry_run,
    memory_need as memory_need,
    memory_table as memory_table,
)
from .card import push_to_hub as push_to_hub
