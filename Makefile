# The commands of the README and of CONTRIBUTING. Without root those that need it stop with a message.
#
#   make lab [ARGS="--real --keep"]   two regions in network namespaces, narrated; root
#   make unit                         all tests that need neither root nor Go, in a minute
#   make test                         everything that has to pass, with real flannel and Kubernetes; root
#   make evidence [ARGS="1. 3.6"]     the table of docs/evidence.md, one line for each case; root
#   make check                        formatting, lints, documentation, dependencies, vendored code
#   make bench                        the benchmarks, as ratios to the peers in one run
#   make fuzz [SECONDS_EACH=60]       the parsers and state machines, a minute each
#   make start-orders                 two regions behind NAT, agents started in all orders; root
#   make leader-faults                each fault of a leader five times, with medians, half an hour; root
#   make path-mtu                     the path MTU between two regions in all sizes; root
#   make sim [SCHEDULES=10000]        whole meshes in a simulation, with faults from seeds
#   make soak [SECONDS_LONG=600]      sessions renewed under load, not one packet lost; root
#   make programs                     kube-apiserver, etcd, flanneld, ... from their Go modules
#   make image-check      the container image's file system, with the lab's agents inside of it
#   make clean

CARGO ?= cargo
ARGS ?=
SECONDS_EACH ?= 60
SECONDS_LONG ?= 600
SCHEDULES ?= 10000

.PHONY: lab unit test evidence check bench fuzz sim soak start-orders leader-faults path-mtu programs image-check clean
.NOTPARALLEL:

lab:
	scripts/setup.sh lab
	$(if $(findstring --real,$(ARGS)),lab/build.sh labcp flanneld)
	$(CARGO) build --quiet --workspace --bins
	$(CARGO) build --quiet --example lab
	target/debug/examples/lab $(ARGS)

programs:
	lab/build.sh

# The unit tests of the packages, and those of tests/unit in one binary. Those of the API client mostly wait, so
# more of them run at once than there are processors.
unit:
	RUST_TEST_THREADS=8 $(CARGO) test --quiet --package selvedge --package boringtun --lib --test unit

# Two test binaries at a time; those that bring up a cluster run their steps in order.
test:
	scripts/setup.sh test
	lab/build.sh
	$(MAKE) check
	scripts/run-tests

evidence:
	scripts/setup.sh test
	lab/build.sh
	$(CARGO) build --quiet --workspace --bins
	$(CARGO) run --quiet --example evidence -- $(ARGS)

# The documentation is for developers, so it may link to private items.
check:
	$(CARGO) fmt --all --check
	scripts/vendor-boringtun --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items --quiet
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --log-level error check licenses bans sources; \
	else echo "check: cargo-deny is not installed, so licences and sources were not checked"; fi

bench:
	scripts/setup.sh bench
	bench/peers.sh
	$(CARGO) build --quiet --release
	$(CARGO) bench --quiet --no-run --bench aead
	$(CARGO) bench --quiet --bench instructions
	$(CARGO) bench --quiet --bench plan --bench datapath
	bench/tunnel.sh $(ARGS)

fuzz:
	tests/fuzz/run $(SECONDS_EACH)

image-check:
	scripts/setup.sh lab
	deploy/check-image.sh $(ARGS)

# Optimised, since a schedule takes most of a second without that. FIRST=n begins with another seed.
FIRST ?= 1
sim:
	SELVEDGE_SIM_FIRST=$(FIRST) SELVEDGE_SIM_SCHEDULES=$(SCHEDULES) \
		CARGO_PROFILE_DEV_OPT_LEVEL=2 $(CARGO) test --quiet --test sim -- --nocapture no_schedule

soak:
	lab/build.sh wireguard-go
	SELVEDGE_SOAK=$(SECONDS_LONG) $(CARGO) test --quiet --test tunnel -- --nocapture session_renewal

start-orders:
	SELVEDGE_START_ORDERS=all $(CARGO) test --quiet --test endpoint_discovery -- orders_of_start

path-mtu:
	SELVEDGE_PATH_MTU=all $(CARGO) test --quiet --test path_mtu

leader-faults:
	SELVEDGE_LEADER_FAULTS=all $(CARGO) test --quiet --test leader_faults

clean:
	$(CARGO) clean
