# Two commands a newcomer needs, each of which sets up all it needs in .venv:
#   make demo    install the runtime (no torch) and make a clip from a sentence
#   make test    install everything and run tests, linter and type checker
.PHONY: demo test lint bundle clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Wheels for torch's CPU build come from the constraints file; a bare `torch` would pull CUDA.
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PIP_ROOT_USER_ACTION = ignore

demo: $(VENV)/.runtime
	@mkdir -p demo
	@echo '--- a clip from a sentence'
	$(RUN)/videolavit generate "a red circle moving right" -o demo/clip.mp4 --seed 7 --force
	@echo '--- how it was made'
	$(RUN)/videolavit inspect demo/clip.mp4
	@echo '--- its motion vectors, drawn'
	$(RUN)/videolavit motion demo/clip.mp4 --overlay demo/arrows.mp4 --force
	@echo '--- a question about it'
	$(RUN)/videolavit ask demo/clip.mp4 "what moves?" --max-answer-tokens 16
	@echo '--- done: open demo/clip.mp4 and demo/arrows.mp4'

# One process a core, each with one thread for torch; a file's tests stay together and share what they set up.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# The demo bundle in engines/shapes, made again from its seed.
bundle: $(VENV)/.dev
	rm -rf build/shapes && mkdir -p build
	$(RUN)/videolavit init shapes -o build/shapes --seed 0
	$(RUN)/videolavit export build/shapes -o engines/shapes --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --editable '.[cpu,export,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build demo
