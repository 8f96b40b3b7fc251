# Two commands a newcomer needs, each of which sets up all it needs in .venv:
#   make demo    install the runtime (no torch) and make a clip from a sentence
#   make test    install everything and run tests, linter and type checker
.PHONY: demo test lint shapes-model bundle quality clean

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

# The shipped model, trained from nothing in build/shapes: about 23 hours of one core. Ended early, it goes on where
# it stopped. Each stage needs what the ones before it made (docs/training.md).
RECIPES := videolavit/training/recipes/shapes
TRAIN = $(RUN)/videolavit train $(1) --config $(RECIPES)/$(1)$(2).toml --checkpoint build/$(or $(3),shapes) \
	-o build/runs/$(1)$(2) --resume
TOKENIZE = $(RUN)/videolavit tokenize $(or $(2),shapes) -o build/tokens/$(1) --checkpoint build/shapes --workers 2 --resume
PICTURE_FIELDS := visual_ids,features,keep_logits
CLIP_FIELDS := latents,keyframe,motion_latent,motion_ids

shapes-model: $(VENV)/.dev
	@mkdir -p build/runs build/tokens checkpoints
	test -e build/shapes || $(RUN)/videolavit init shapes -o build/shapes --seed 0 --layers 4
	$(call TRAIN,vision)
	$(call TRAIN,visual-tokenizer)
	$(call TRAIN,motion-tokenizer)
	$(call TRAIN,keyframe-vae)
	$(call TRAIN,video-vae)
	$(call TRAIN,keyframe-detokenizer)
	$(call TRAIN,keyframe-detokenizer,-more)
	$(call TOKENIZE,clips) --count 6000 --seed 0 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,pictures) --count 3000 --seed 1 --fields $(PICTURE_FIELDS)
	$(call TOKENIZE,pairs) --count 800 --seed 2 --clips 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TRAIN,language-model)
	$(call TRAIN,instruct)
	$(call TOKENIZE,clips-more) --count 12000 --seed 4 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,pictures-more) --count 6000 --seed 5 --fields $(PICTURE_FIELDS)
	$(call TOKENIZE,pairs-more) --count 1200 --seed 6 --clips 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TRAIN,instruct,-more)
	$(call TRAIN,instruct,-binding)
	$(call TRAIN,instruct,-last)
	$(call TRAIN,instruct,-binding-directions)
	$(call TRAIN,instruct,-binding-both)
	$(call TRAIN,instruct,-binding-written)
	$(call TRAIN,instruct,-together)
	$(call TRAIN,instruct,-directions)
	$(call TRAIN,instruct,-longest)
	$(call TRAIN,keyframe-detokenizer,-third)
	$(call TOKENIZE,videos) --count 1500 --seed 3 --fields $(CLIP_FIELDS)
	$(call TRAIN,video-detokenizer,-short)
	$(call TRAIN,video-detokenizer)
	$(call TRAIN,video-detokenizer,-scattered)
	$(call TRAIN,video-detokenizer,-scattered-more)
	$(call TRAIN,video-detokenizer,-more)
	$(call TRAIN,video-detokenizer,-scattered-third)
	$(call TOKENIZE,scenery,scenery) --count 700 --seed 7 --fields $(CLIP_FIELDS)
	$(call TRAIN,video-detokenizer,-scenery)
	$(call TRAIN,video-detokenizer,-noisy)
	$(call TRAIN,video-detokenizer,-noisy-more)
	$(call TRAIN,video-detokenizer,-whole)
	$(call TRAIN,video-detokenizer,-noisy-third)
	$(call TRAIN,video-detokenizer,-whole-more)
	$(call TRAIN,keyframe-detokenizer,-fourth)
	$(call TOKENIZE,clips-fresh) --count 8000 --seed 8 --fields $(PICTURE_FIELDS),motion_ids
	test -e build/shapes-deep || $(RUN)/videolavit deepen build/shapes -o build/shapes-deep --layers 6
	$(call TRAIN,instruct,-deep,shapes-deep)
	$(call TOKENIZE,two-shapes) --count 14000 --seed 12 --shapes 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TRAIN,instruct,-pairs,shapes-deep)
	$(call TOKENIZE,videos-fresh) --count 2000 --seed 11 --fields $(CLIP_FIELDS)
	$(call TRAIN,video-detokenizer,-noisy-fourth,shapes-deep)
	$(call TRAIN,video-detokenizer,-whole-third,shapes-deep)
	$(call TRAIN,instruct,-negatives,shapes-deep)
	$(call TRAIN,instruct,-told,shapes-deep)
	$(call TOKENIZE,two-shapes-more) --count 7000 --seed 14 --shapes 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,clips-third) --count 3000 --seed 15 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,pictures-third) --count 1500 --seed 16 --fields $(PICTURE_FIELDS)
	$(call TOKENIZE,pairs-third) --count 400 --seed 17 --clips 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TRAIN,instruct,-told-more,shapes-deep)
	$(call TOKENIZE,two-shapes-fourth) --count 24000 --seed 29 --shapes 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,clips-fourth) --count 3000 --seed 26 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,pictures-fourth) --count 1500 --seed 27 --fields $(PICTURE_FIELDS)
	$(call TOKENIZE,pairs-fourth) --count 400 --seed 28 --clips 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TRAIN,instruct,-places,shapes-deep)
	$(call TRAIN,instruct,-placed,shapes-deep)
	$(call TOKENIZE,two-shapes-fifth) --count 24000 --seed 32 --shapes 2 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,clips-fifth) --count 3000 --seed 33 --fields $(PICTURE_FIELDS),motion_ids
	$(call TOKENIZE,pictures-fifth) --count 1500 --seed 34 --fields $(PICTURE_FIELDS)
	$(call TOKENIZE,pairs-fifth) --count 400 --seed 35 --clips 2 --fields $(PICTURE_FIELDS),motion_ids
	test -e build/shapes-ordered || cp -r build/shapes-deep build/shapes-ordered
	$(call TRAIN,instruct,-ordered,shapes-ordered)
	$(call TRAIN,instruct,-answered,shapes-deep)
	test -e build/shapes-answered || cp -r build/shapes-deep build/shapes-answered
	$(call TRAIN,instruct,-answered-more,shapes-deep)
	test -e build/shapes-mean || $(RUN)/videolavit average build/shapes-answered build/shapes-ordered build/shapes-deep \
		-o build/shapes-mean
	$(call TOKENIZE,videos-two) --count 1200 --seed 13 --shapes 2 --fields $(CLIP_FIELDS)
	$(call TOKENIZE,videos-third) --count 600 --seed 18 --fields $(CLIP_FIELDS)
	$(call TOKENIZE,scenery-more,scenery) --count 350 --seed 19 --fields $(CLIP_FIELDS)
	$(call TRAIN,video-detokenizer,-whole-fourth,shapes-mean)
	$(call TOKENIZE,videos-rebuilt) --count 512 --seed 20 --shapes 2 --fields $(CLIP_FIELDS),rebuilt_keyframe
	$(call TOKENIZE,videos-fourth) --count 500 --seed 21 --fields $(CLIP_FIELDS),rebuilt_keyframe
	$(call TOKENIZE,scenery-third,scenery) --count 350 --seed 22 --fields $(CLIP_FIELDS)
	$(call TRAIN,video-detokenizer,-rebuilt,shapes-mean)
	$(call TOKENIZE,videos-rebuilt-more) --count 640 --seed 24 --shapes 2 --fields $(CLIP_FIELDS),rebuilt_keyframe
	$(call TRAIN,video-detokenizer,-rebuilt-more,shapes-mean)
	rm -rf checkpoints/shapes && cp -r build/shapes-mean checkpoints/shapes
	$(MAKE) bundle quality

# The bundle in engines/shapes, from the checkpoint.
bundle: $(VENV)/.dev
	@test -e checkpoints/shapes || { echo 'checkpoints/shapes: not there; make shapes-model trains it'; exit 2; }
	$(RUN)/videolavit export checkpoints/shapes -o engines/shapes --force
	$(RUN)/videolavit verify engines/shapes checkpoints/shapes

# What the bundle can do, measured on scenes it was not trained on; more than half an hour on two cores.
quality: $(VENV)/.dev
	$(RUN)/videolavit evaluate shapes -o docs/quality.md --sheet docs/quality.png

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
