# make demo    from nothing to a table 'SFT | SFT continued | GRPO_rank' and a plot (minutes on two cores)
# make test    the tests (minutes on two cores)
# make world   the weights in embedded_world/weights trained again from nothing, into runs/weights (a quarter of an hour)
# make test-slow   the long ones: every script killed twenty times, a thousand damaged videos (minutes)
# make mutants   about 190 planted errors, each of which a test must notice (hours on two cores)
# make results   the tables and pictures of accuracy again, three seeds (hours on two cores)
# All make .venv when it is not there; everything is resumable, what is finished is not done again.

PYTHON ?= python3
PROCS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PY = .venv/bin/python
# of the tests: half of their time is waiting for processes and servers of their own, so two per core of a small machine
WORKERS ?= 4
# one process per core with one thread each: small models are faster side by side than each on all cores
DIST = $(PY) -m torch.distributed.run --standalone --nproc_per_node=$(if $(filter 1,$(PROCS)),1,2)
WORLD = data/moving_shapes
POLICY = --data $(WORLD)/train.json --num_clips 40 --batch_size 16

.PHONY: demo mutants results test test-slow world

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: .venv/done
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: .venv/done
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow -o faulthandler_timeout=7200

mutants: .venv/done
	$(PY) tests/mutants.py --out runs/mutants.json

demo: export OMP_NUM_THREADS = 1
demo: .venv/done
	$(PY) embedded_world/moving_shapes.py
	$(DIST) sft.py --name policy $(POLICY) --steps 200 --lr 1e-3 --resume
	$(PY) evaluate.py --watch runs/grpo_rank/demo_s0 --out runs/demo & watch=$$!; \
	    $(DIST) grpo_rank.py --G 5 --name demo --resume; done=$$?; kill $$watch 2>/dev/null; exit $$done
	$(DIST) sft.py --name continued $(POLICY) --model runs/sft/policy_s0/final --steps 150 --lr 3e-4 --resume
	$(DIST) evaluate.py --runs runs/sft/policy_s0 runs/sft/continued_s0 runs/grpo_rank/demo_s0 \
	    --labels "SFT,SFT continued,GRPO_rank" --out runs/demo

world: export OMP_NUM_THREADS = 1
world: .venv/done
	$(PY) embedded_world/moving_shapes.py
	OMP_NUM_THREADS=$(PROCS) $(PY) embedded_world/pretrain_tiny.py
	$(DIST) sft.py --name oracle --clip $(WORLD)/hub/clip --qformer $(WORLD)/hub/qformer --llm $(WORLD)/hub/llm --resume
	$(PY) embedded_world/ship.py

results: .venv/done
	bash experiments/results.sh
