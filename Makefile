# Two commands do everything: `make quickstart` runs the whole pipeline in minutes, `make test` checks all of it.
# Both make their own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart study results real real-smoke test slow lowest mutants notebooks figures drift docs clean help

help:            ## list what can be made
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

.venv/.ready: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say PYTHON=/path/to/it")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

quickstart: .venv/.ready ## the whole pipeline on the embedded world: runs/quickstart/report.html
	$(BIN)/faithful-distill reproduce --profile quickstart

study: .venv/.ready ## every figure and table on several seeds, resumable: runs/study/report.html; COMPARE=data/results: which kept results came out again
	$(BIN)/faithful-distill reproduce --profile study $(if $(COMPARE),--compare '$(COMPARE)')

results: .venv/.ready ## the study's small tables into data/results (what is there is not computed again); then `make figures`
	$(BIN)/faithful-distill reproduce --profile study --keep data/results

real: .venv/.ready ## the method on CommonsenseQA with pretrained models, hours, resumable: runs/real/report.html; DIR=folder of datasets, SEED=2 one seed
	$(BIN)/faithful-distill reproduce --profile real $(if $(DIR),--data-dir '$(DIR)') $(if $(SEED),--seed $(SEED)) $(if $(KEEP),--keep '$(KEEP)')

real-smoke: .venv/.ready ## the same pipeline at 40 questions, a few minutes: DIR=folder of datasets
	$(BIN)/faithful-distill reproduce --profile real-smoke $(if $(DIR),--data-dir '$(DIR)')

test: .venv/.ready drift notebooks ## everything that must hold
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --dist loadfile

slow: .venv/.ready ## the tests that `make test` leaves out: kills at random, launchers, long comparisons
	FAITHFUL_DISTILL_SLOW=1 $(BIN)/python -m pytest tests -q
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python tests/audit.py || test $$? -eq 77  # 77: its service cannot be reached

lowest: ## every test on the lowest versions that settings.ini allows, in an environment of its own: .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct '.[served,gguf]'
	.venv-lowest/bin/uv pip freeze --python .venv-lowest/bin/python | grep -v @ > .venv-lowest/constraints.txt
	.venv-lowest/bin/uv pip install --constraint .venv-lowest/constraints.txt --python .venv-lowest/bin/python $(shell sed -n 's/^dev_requirements = //p' settings.ini | sed "s/[^ ]*/'&'/g")
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-lowest/bin/python -m pytest tests -q -n 2 --dist loadfile

mutants: .venv/.ready ## how many small faults the tests notice, hours: ARGS="--sample 20 contrast loss" tries some of them
	$(BIN)/python -m pip install --quiet 'cosmic-ray>=8.7,<9'
	$(BIN)/python tests/mutants.py $(ARGS)

drift: .venv/.ready ## notebooks and modules are the same, and formatted
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/drift.py
	$(BIN)/ruff format --check --quiet nbs tests setup.py
	$(BIN)/ruff check --quiet nbs tests setup.py
	$(BIN)/ruff check --quiet --isolated --select E9,F,B --ignore B008,B023,B905 faithful_distill # what only a page's examples use is not exported

notebooks: .venv/.ready ## every notebook runs, top to bottom
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --skip_folder_re "experiments|figures"

figures: .venv/.ready ## draw all figures once more from data/results, in their notebooks
	cd nbs/figures && "$(CURDIR)/$(BIN)/jupyter" nbconvert --log-level WARN --clear-output --inplace fig*.ipynb claims.ipynb any_axis.ipynb
	cd nbs/figures && for notebook in fig*.ipynb claims.ipynb any_axis.ipynb; do "$(CURDIR)/$(BIN)/exec_nb" --exc_stop $$notebook --dest $$notebook || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean
	$(BIN)/python docs/readme_table.py

docs: .venv/.ready ## the site, from the stored notebooks: docs/_build/html/index.html
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

clean: ## remove the environment and whatever was computed
	rm -rf .venv .venv-lowest runs data/runs data/cache build *.egg-info docs/_build docs/pages docs/generated docs/project docs/generated_pictures docs/api.md docs/cli.md docs/report.md
