# Every target sets up what it needs in .venv, on a machine that has python3 (3.10 or newer) and a C++ compiler.

PYTHON ?= python3
METHOD ?= simclr
DATA   ?= digits
RANKS  ?= 1
JOBS   ?= auto
OUT    ?= out/gpu

BIN   := .venv/bin
READY := .venv/.requirements
PEERS := .venv/.peers
DOCS  := .venv/.docs
OTHER_TRITONS := build/triton-3.6.0
BUILT := build/.editable
CPP   := $(wildcard csrc/*.h $(foreach folder,csrc/* csrc/cpu/engine,$(addprefix $(folder)/,*.h *.cpp *.cu)))
EMULATOR := $(wildcard $(addprefix tests/cuda_emulator/,*.h *.cpp *.cu include/*.h))

.PHONY: help demo check test triton-versions lint docs serve-docs sanitize sanitize-cuda bench readme gpu clean

help:
	@echo "make demo   train on real images, fused beside plain; table, picture and JSON in out/demo"
	@echo "            (METHOD=simclr, barlow, vicreg, byol, simsiam, swav, dino, lejepa or mae;"
	@echo "            DATA=digits, DATA=fashion-mnist or DATA=<folder of images>;"
	@echo "            RANKS=2 on two processes: simclr, barlow, vicreg)"
	@echo "make check  the inner loop: build in place and run the quick tests, in two minutes"
	@echo "make test   build in place and run every test (JOBS=0 in one process)"
	@echo "make triton-versions  every Triton kernel ahead of time, for every GPU, by other versions of Triton too"
	@echo "make lint   ruff, clang-format, line lengths of code and of prose, mypy"
	@echo "make docs   the documentation site in build/site; a dead link or an unlisted page fails"
	@echo "make serve-docs  the site on http://127.0.0.1:8000, built anew at every change"
	@echo "make sanitize  the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make sanitize-cuda  the CUDA kernels, emulated on the CPU, under AddressSanitizer and ThreadSanitizer"
	@echo "make bench  correctness, then time and memory of every operation; CSV and picture"
	@echo "make readme write the tables of the README and of the pages from benchmarks/results"
	@echo "make gpu    on a machine with a CUDA GPU: build, correctness, times, GPU tests, compute-sanitizer"
	@echo "            (STAGES=A,B for the first two; results in OUT=$(OUT))"
	@echo "make clean  remove what was built; .venv stays"

$(READY): requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

# Without build isolation: against the torch that is installed, and only what changed is compiled.
$(BUILT): $(READY) setup.py pyproject.toml $(CPP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	mkdir -p $(@D) && touch $@

RUN := $(if $(filter 1,$(RANKS)),$(BIN)/python,$(BIN)/torchrun --nproc-per-node $(RANKS))
demo: $(BUILT)
	$(RUN) -m examples.pretrain --method $(METHOD) --data $(DATA) --output out/demo

check: $(BUILT) $(PEERS)
	$(BIN)/python -m pytest -n $(JOBS) --quick

test: $(BUILT) $(PEERS) $(DOCS) $(OTHER_TRITONS)
	$(BIN)/python -m sslfast
	$(BIN)/python -m pytest -n $(JOBS)

# Beside the installed Triton. Without them the tests that compile by one are skipped, and counted.
$(OTHER_TRITONS): build/triton-%: | $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

triton-versions: $(BUILT) $(OTHER_TRITONS)
	for triton in $(OTHER_TRITONS); do \
	  PYTHONPATH=$(CURDIR)/$$triton $(BIN)/python -m pytest -n $(JOBS) tests/gpu/test_triton_aot.py || exit 1; \
	done

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built apart from the ordinary libraries.
SANITIZED := build/sanitized
RUNTIMES  := $$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	git ls-files -z | tar --create --null --files-from - | tar --extract --directory $(SANITIZED)
	cd $(SANITIZED) && SSLFAST_SANITIZE=address,undefined $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH=. \
	  $(CURDIR)/$(BIN)/python -m pytest -q -m "sanitize and not slow" \
	  -k "not compile and not memory and not every_cpu_level"

sanitize-cuda: $(BUILT)
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m cuda_emulator --sanitizer address
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m cuda_emulator --sanitizer thread

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(EMULATOR)
	@! LC_ALL=C.UTF-8 grep -nE '^.{121,}' $(CPP) $(EMULATOR) || { echo "the lines above are longer than 120 characters"; exit 1; }
	$(BIN)/python -m tools.prose
	$(BIN)/mypy

# Without them the test of the site is skipped, and counted.
$(DOCS): requirements-docs.txt $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt && touch $@

# The sources are read, not imported: nothing has to be built.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: $(DOCS)
	$(MKDOCS) build --strict

serve-docs: $(DOCS)
	$(MKDOCS) serve --strict

$(PEERS): requirements-bench.txt $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-bench.txt && touch $@

bench: $(BUILT) $(PEERS)
	$(BIN)/python -m benchmarks

readme: $(BUILT)
	for page in README.md docs/measured.md docs/limits.md; do $(BIN)/python -m benchmarks.plot --readme $$page || exit 1; done

# With the machine's own python3 where its torch sees the GPU (nothing is downloaded then), else with that of .venv.
# Whatever is red, the rest is run; the exit status says so in the end. All output also goes to $(OUT)/gpu.log.
SEES_GPU := -c "import torch; assert torch.cuda.is_available(), 'this torch sees no CUDA GPU'"
GPU_ARCH := -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
STAGES   ?= A,B,C,D

gpu: SHELL := /bin/bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu:
	@mkdir -p $(OUT)
	@{ status=0; python=$(PYTHON); $$python $(SEES_GPU) 2>/dev/null || python=$(BIN)/python; \
	set -x; \
	$$python $(SEES_GPU) || exit 1; \
	nvidia-smi || status=1; \
	export TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$($$python $(GPU_ARCH))}; \
	$$python -m pip install --no-build-isolation --no-deps --editable . || status=1; \
	$$python -m sslfast || status=1; \
	$$python -m tools.device --stages $(STAGES) --output $(OUT) || status=1; \
	exit $$status; } 2>&1 | tee $(OUT)/gpu.log

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f sslfast/*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
