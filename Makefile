# The two commands of the README, and the chores behind them. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
TIMM := .venv-timm
PEER := .venv-kvpress
LLMLINGUA := .venv-llmlingua
FITS := out/kvzap.fit out/razorattention.fit out/compresskv.fit

.PHONY: demo test test-oldest test-timm test-frameworks test-ray check bench bench-vit bench-vlm bench-serve bench-prompt evidence evidence-vit evidence-vlm evidence-prompt evidence-tune reference-vlm docs clean

demo: $(VENV)/.installed  ## compare every method on the default model: table, out/report.html, out/results.jsonl
	scripts/demo

test: $(VENV)/.installed  ## every test, the model-backed ones included
	scripts/test

check: $(VENV)/.installed  ## lint, format and types
	scripts/check

test-oldest: $(OLDEST)/.installed  ## the tests on the oldest transformers that is supported
	scripts/test-oldest

test-timm:  ## the tests on timm's encoders, where their environment can be had
	scripts/test-timm

test-frameworks:  ## the adapters of LangChain, LlamaIndex and Haystack, where their environment can be had
	scripts/test-frameworks

test-ray:  ## bulk prompts on a Ray cluster of two nodes, where its environment can be had
	scripts/test-ray

bench: $(VENV)/.installed $(PEER)/.installed  ## speed and bytes beside kvpress and transformers' quantised cache
	$(BIN)/python benchmarks/kv.py --peer $(PEER)/bin/python --repeats 4
	scripts/install $(VENV) -e '.[dev,bench]'
	$(BIN)/python benchmarks/kv.py --part storage --repeats 10
	$(BIN)/python benchmarks/kv.py --part prefill

bench-vit: $(VENV)/.installed  ## images a second of every method for encoders, beside the host and the floor
	$(BIN)/python benchmarks/vit.py --cases 224x1,224x16 --rounds 3
	$(BIN)/python benchmarks/vit.py --cases 448x1,448x8,518x1 --methods tome,topk,ward,random,uniform --rounds 3 \
	    --json results/vit-speed-large.json
	$(BIN)/python benchmarks/vit.py --cases 448x16,518x16 --methods tome,topk,ward,random,uniform --rounds 2 \
	    --json results/vit-speed-16.json

bench-vlm: $(VENV)/.installed  ## time to the first token of every method for visual tokens, stage by stage
	$(BIN)/python benchmarks/vlm.py --rounds 5

bench-prompt: $(VENV)/.installed $(LLMLINGUA)/.installed  ## llmlingua2 beside package llmlingua: kept words, speed, memory
	scripts/install $(VENV) -e '.[dev,bench]'
	$(BIN)/python benchmarks/prompt.py --peer $(LLMLINGUA)/bin/python --parity 1500
	$(BIN)/python benchmarks/prompt.py --peer $(LLMLINGUA)/bin/python

bench-serve: $(VENV)/.installed  ## 50 clients for a minute of the server: compressing, and chats that are forwarded
	$(BIN)/python benchmarks/serve.py --json results/serve.json
	$(BIN)/python benchmarks/serve.py --route chat --json results/serve.json

evidence-vit: $(VENV)/.installed  ## every method for encoders on real pictures: results/vit-dinov2s.json (goes on where it stopped)
	$(BIN)/python scripts/vit_evidence.py

evidence-vlm: $(VENV)/.installed  ## every method for visual tokens on the reference model: results/vlm.json (goes on where it stopped)
	$(BIN)/python scripts/vlm_evidence.py

reference-vlm: $(VENV)/.installed  ## train that model anew: an hour on two cores
	$(BIN)/python scripts/train_reference_vlm.py

evidence-tune: $(VENV)/.installed  ## the plans that fewer tune finds, beside fixed methods: results/tune.json (goes on where it stopped)
	$(BIN)/python scripts/tune_evidence.py

evidence-prompt: out/provence.fit  ## every prompt method on questions about documents: results/prompt.json (goes on where it stopped)
	$(BIN)/python scripts/prompt_evidence.py --fit out/provence.fit

evidence: $(FITS)  ## every cache method at every budget and length: results/kv-smollm2.json (hours; goes on where it stopped)
	$(BIN)/python scripts/evidence.py $(addprefix --fit ,$(FITS))

out/%.fit: | $(VENV)/.installed
	mkdir -p out
	$(BIN)/fewer fit $* --out $@

docs: $(VENV)/.installed  ## write the generated parts of the README anew
	$(BIN)/python scripts/readme.py
	$(BIN)/python -m tests.visual_matrix

$(VENV)/.installed: pyproject.toml constraints.txt
	scripts/install $(VENV) -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	scripts/install $(OLDEST) -e '.[dev]' 'transformers==5.2.0'
	touch $@

$(PEER)/.installed: constraints.txt
	scripts/install $(PEER) 'kvpress==0.5.5' 'transformers==5.2.0'
	touch $@

$(LLMLINGUA)/.installed: constraints.txt
	scripts/install $(LLMLINGUA) 'llmlingua==0.2.2' 'transformers==4.48.3'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(TIMM) .venv-frameworks .venv-ray $(PEER) $(LLMLINGUA) out dist
