# make study [DATASET=cifar10 DATA=path PRESET=small N_MODELS=32 ...]: run the notebooks into outputs/<dataset>/
# make plan [the same]: what is left to train, and what it costs; make work: train it, beside other processes
# make report [DATASET=cifar10 | OUT=folder]: outputs/<dataset>/report/index.html anew, from the notebooks run so far
# make audit DATA=logits.npz[,other.npz] OUT=outputs/mine: the audit of logits from any framework
# make bench [ONLY=training,gpu]: every speed claim as a ratio; make faults: kills, full disks, damage and the rest
# make lab [LAB='--port 8899 --no-browser']: JupyterLab on the notebooks
# Any parameter of `python -m lib.study --help`, in upper case, may follow; an unknown one is an error.

PYTHON ?= python3
BIN := .venv/bin
# what was given on make's command line as NAME=value, quoted for the shell: values may hold spaces and parentheses
NAMES = $(filter-out PYTHON LAB ONLY,$(foreach word,$(MAKEOVERRIDES),$(firstword $(subst =, ,$(word)))))
QUOTED = '$(1)=$(subst ','\'',$(value $(1)))'
PARAMETERS = $(foreach name,$(NAMES),$(if $(filter command,$(origin $(name))),$(call QUOTED,$(name))))

.DEFAULT_GOAL := study
.PHONY: study plan work report audit test lab bench faults lint sync

study: .venv/.ready
	@$(BIN)/python -m lib.study $(PARAMETERS)

plan work report audit: .venv/.ready
	@$(BIN)/python -m lib.study --$@ $(PARAMETERS)

# two processes of one thread each, which take whole files; tests/conftest.py puts the longest first
test: .venv/.ready
	@OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: .venv/.ready
	$(BIN)/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

bench: .venv/.ready
	@$(BIN)/python -m benchmarks.bench $(ONLY) $(if $(OUT),--out '$(OUT)')

faults: .venv/.ready
	@$(BIN)/python -m benchmarks.faults

lint: .venv/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

sync: .venv/.ready
	@$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace notebooks/*.ipynb
	@$(BIN)/jupytext --quiet --to ipynb --update notebooks/*.py
	@$(BIN)/python -m tools.readme

.venv/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing the dependencies into .venv (once; about 5 GB, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,ray]'
	@touch $@
