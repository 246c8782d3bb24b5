from .exchange import import_rationales as import_rationales
from .faithfulness.interventions import measure as measure
from .faithfulness.leakage_adjusted import las as las
from .faithfulness.metrics import (
    early_answering_aoc as early_answering_aoc,
    perturbation_drop as perturbation_drop,
    refinement_gain as refinement_gain,
    swap_consistency as swap_consistency,
)
from .faithfulness.scoring import score_rationales as score_rationales
from .files import BadInput as BadInput
from .lab.runs import run_notebook as run_notebook
from .lab.study import reproduce as reproduce
from .overlaps import overlap as overlap
from .publishing import publish_rationales as publish_rationales
from .questions import Question as Question
from .reasoners.opening import open_reasoner as open_reasoner
from .reasoners.protocol import Reasoner as Reasoner
from .sources import load_questions as load_questions
from .student.answers import answer as answer, explain as explain
from .student.model import load_student as load_student
from .teacher.generate import contrastive_generate as contrastive_generate
from .teacher.loading import load_teacher as load_teacher
from .teacher.rationales import rationalize as rationalize
from .training.settings import Settings as Settings
from .training.train import train_student as train_student
