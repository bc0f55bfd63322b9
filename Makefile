.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(INSTALLED)  ## create the environment in .venv

demo: $(INSTALLED)  ## train the paper's recipe on handwritten digits, sample and evaluate (3 to 7 minutes on two cores)
	$(BIN)/selfalign train sra-dts-as --out runs/demo --data.name digits --model.size tiny \
		--training.steps 1100 --training.batch-size 64 --training.learning-rate 1e-3 \
		--training.schedule cosine --training.warmup-steps 50 --training.ema-decay 0.995 \
		--training.sample-every 550 --training.evaluate-every 275
	$(BIN)/selfalign evaluate runs/demo --num 500 --solver heun --steps 15

test: $(INSTALLED)  ## run the tests (9 to 16 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(INSTALLED)  ## run the slow tests too
	$(BIN)/python -m pytest -n 2 --dist loadfile -m ''

lint: $(INSTALLED)  ## run the linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the site in build/site; a broken link fails
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/stage_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

audit: $(INSTALLED)  ## look the locked versions up in the advisory database (needs the internet)
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

lock: $(INSTALLED)  ## write requirements.lock: the versions of constraints.txt with the hashes of their files
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile constraints.txt --no-deps --generate-hashes --no-header --no-annotate --quiet -o requirements.lock

clean:  ## remove the environment and everything generated
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help install demo test test-all lint docs audit lock clean
