from .world import judge as judge, world_questions as world_questions
from .runs import run_notebook as run_notebook
from .grid import load_grid as load_grid
from .study import reproduce as reproduce
