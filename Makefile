# ftvm: the two commands are `make demo` and `make test`.
CARGO ?= cargo

.PHONY: all setup build guests demo test test-kvm soak deb rpm clean

all: build

setup:
	packaging/setup.sh

build:
	$(CARGO) build --release --workspace --bins

guests: setup
	tests/guests/build.sh build/guests all

# A protected Debian machine on two hosts (network namespaces); the primary is killed; figures printed.
demo: setup build guests
	target/release/demo

# All set-up, then every test.
test: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(CARGO) build --release --workspace --bins
	tests/guests/build.sh build/guests all
	$(CARGO) build --release --manifest-path tests/second-reader/Cargo.toml --target-dir build/second-reader
	@tests/kvm/run.sh list
	CARGO="$(CARGO)" tests/run.sh

# All checks of -accel kvm, those that need real hardware among them; says what it could not run, and why.
test-kvm: setup
	$(CARGO) build --release --workspace --bins
	tests/kvm/run.sh

# 100 failovers under load (FTVM_SOAK_ROUNDS to change).
soak: setup build guests
	target/release/soak

# Packages of the release build, in build/; lintian and rpmlint have their say.
deb: setup build
	packaging/deb.sh

rpm: setup build
	packaging/rpm.sh

clean:
	$(CARGO) clean
	rm -rf build
