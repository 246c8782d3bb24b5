from .intervals import (
    Score as Score,
    bootstrap as bootstrap,
    mean_score as mean_score,
    paired_difference as paired_difference,
)
from .metrics import (
    accuracy as accuracy,
    counterfactual_insertion as counterfactual_insertion,
    early_answering_aoc as early_answering_aoc,
    las as las,
    perturbation_drop as perturbation_drop,
    refinement_gain as refinement_gain,
    rev as rev,
    same_answer_rate as same_answer_rate,
    swap_consistency as swap_consistency,
)
from .calibration import calibrate as calibrate, verdicts as verdicts
from .protocol import (
    Intervention as Intervention,
    register_intervention as register_intervention,
)
from .hints import Cue as Cue, Hint as Hint, hint_scores as hint_scores
from .mediation import Mediation as Mediation, mediation_effects as mediation_effects
from .steps import StepProfile as StepProfile, step_profile as step_profile
from .unlearning import Unlearn as Unlearn, Unlearning as Unlearning, unlearning_scores as unlearning_scores
from .variants import Simulatability as Simulatability, simulatability_gain as simulatability_gain
from .agreement import agreement_scores as agreement_scores
from .interventions import measure as measure, measure_insertion as measure_insertion
from .simulator_registry import (
    Embeddings as Embeddings,
    Likelihood as Likelihood,
    as_simulator as as_simulator,
    register_simulator as register_simulator,
)
from .simulators import (
    ModelBehaviour as ModelBehaviour,
    simulate as simulate,
    simulate_folds as simulate_folds,
    try_las as try_las,
)
from .evaluators import measure_rev as measure_rev, rora_lite as rora_lite
from .logs import register_log_format as register_log_format
from .external import read_published as read_published, read_rationales as read_rationales
from .families import Family as Family, register as register
from .scoring import score_rationales as score_rationales
from .suite import Suite as Suite, measure_suite as measure_suite
