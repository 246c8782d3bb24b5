from .card import model_card as model_card, push_to_hub as push_to_hub
from .folder import TrainingResult as TrainingResult
from .launch import train_seeds as train_seeds
from .settings import (
    Settings as Settings,
    recipe as recipe,
    recipes as recipes,
)
from .sizing import (
    deepspeed_estimate as deepspeed_estimate,
    dry_run as dry_run,
    memory_need as memory_need,
    memory_table as memory_table,
)
from .train import train_student as train_student
