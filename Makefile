# Two commands are for newcomers: "make demo" and "make test". Each installs all that it needs.
.PHONY: install dev sysroot check test test-unit test-guest demo clean

install:        ## nvmove in .venv/bin
	@scripts/install
dev:            ## the same with what tests and checks need
	@scripts/install dev
sysroot:        ## the demo's and the tests' QEMU and guest; prints the path last
	@scripts/system-packages sysroot
	@scripts/sysroot
check: dev      ## ruff, mypy --strict, import-linter
	@scripts/check
test: dev sysroot ## every test, unit to guest
	@scripts/test
test-unit: dev  ## the fast ones
	@scripts/test tests/unit tests/stateful
test-guest: dev sysroot ## ENGINE=plain: on that engine
	@NVMOVE_ENGINE=$(ENGINE) scripts/test tests/guest
demo: install sysroot ## the story of the README on a real guest
	@.venv/bin/nvmove demo
clean:
	find src -name '*.so' -delete
	rm -rf .venv build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
