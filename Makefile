# make test | test-all | wheel | demo | study | lint | site | bench | docs: each does its own set-up, in .venv beside this file.
PYTHON ?= python3
TORCH ?= torch==2.13.0

python := .venv/bin/python
sources := CMakeLists.txt pyproject.toml $(wildcard cmake/* csrc/* csrc/*/*)

.PHONY: test test-all wheel demo study lint site bench docs clean
.DELETE_ON_ERROR:

# Two test processes: most tests keep one core busy. Threads that wait for work must not spin then.
test test-all: .venv/installed .venv/development .venv/demo
	OMP_WAIT_POLICY=passive $(python) -m pytest --numprocesses 2 --dist worksteal $(chosen)
	$(afterwards)

# What is slow and rarely fails alone (four processes, most compiled graphs, ...) is left to make test-all.
test: chosen := -m "not slow"

# The wheel in clean environments, with the oldest and the newest torch: some GB of downloads.
test-all: afterwards = $(python) .ci/clean_environments.py

# The sdist and the wheel of a release, built and checked, in dist/. options=--twice builds both again and compares bytes.
wheel: .venv/release
	$(python) .ci/make_wheel.py $(options)

demo: .venv/installed .venv/demo
	$(python) examples/sentiment

# It can be interrupted: the next call goes on with the runs that are missing. options="--budget 60" ends it in an hour.
study: .venv/installed .venv/demo
	$(python) examples/sentiment/study.py $(options)

lint: .venv/installed .venv/development
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) .ci/check_imports.py
	$(python) .ci/check_links.py
	.venv/bin/clang-format --dry-run --Werror $$(find csrc tests benchmarks \
		-name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

site: .venv/site # the pages and the docstrings, in build/site
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet
	@echo "== Built: build/site/index.html"

bench: .venv/installed .venv/demo
	$(python) benchmarks/logits_cpu.py benchmarks/results
	$(python) benchmarks/fused_head.py benchmarks/results
	$(python) benchmarks/distillation_cpu.py benchmarks/results
	$(python) benchmarks/training_step.py benchmarks/results
	$(python) benchmarks/small_calls.py benchmarks/results
	$(python) benchmarks/divergences_cpu.py benchmarks/results
	$(python) benchmarks/render.py

docs: .venv/installed .venv/demo # options, measured errors and figures, put into the pages
	$(python) docs/fill.py

clean:
	rm -rf .venv build dist

# torch comes first and by itself: anything else would pull the newest one.
.venv/torch:
	@echo "== Making .venv and installing $(TORCH) (the largest download)"
	$(PYTHON) -m venv .venv
	$(python) -m pip install --quiet --upgrade pip
	$(python) -m pip install $(TORCH)
	@touch $@

.venv/installed: .venv/torch $(sources)
	@echo "== Building tdpo_ext and installing it in .venv (under a minute)"
	$(python) -m pip install --editable .
	@$(python) -c "import tdpo_ext; print('== Built:', tdpo_ext.backends()['cpu'])"
	@touch $@

.venv/development: .venv/torch requirements-development.txt
	@echo "== Installing what the tests and linters need"
	$(python) -m pip install --requirement requirements-development.txt
	@touch $@

.venv/release: .venv/development requirements-release.txt
	@echo "== Installing what make wheel needs"
	$(python) -m pip install --quiet --requirement requirements-release.txt
	@touch $@

.venv/site: .venv/development requirements-site.txt
	@echo "== Installing what the site needs"
	$(python) -m pip install --quiet --requirement requirements-site.txt
	@touch $@

# What the extra names, without building tdpo_ext once more as ".[demo]" would.
extra := from importlib.metadata import requires; \
	print(*[r.split(";")[0] for r in requires("tdpo_ext") if "demo" in r], sep="\n")

.venv/demo: .venv/installed pyproject.toml
	@echo "== Installing what the demo needs"
	$(python) -c '$(extra)' > .venv/demo.txt
	$(python) -m pip install --requirement .venv/demo.txt
	@touch $@
