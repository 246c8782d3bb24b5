"""What several tests need: where the real data lies, and one thread."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    "Folder of the public datasets: `shared/data` beside the checkout, or inside $FAITHFUL_DISTILL_SHARED."
    shared = Path(os.environ.get("FAITHFUL_DISTILL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "data" / "csqa").is_dir():
        pytest.skip(f"the public datasets are not in {shared / 'data'}")
    return shared / "data"
