"""The compiled parts: every .pyx below src. Each is optional: without a C compiler the same program runs without it."""

from __future__ import annotations

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

_SOURCE = Path("src")


def _extension(path: Path) -> Extension:
    name = ".".join(path.relative_to(_SOURCE).with_suffix("").parts)
    return Extension(name, [str(path)], optional=True, extra_compile_args=["-O3"])


setup(
    ext_modules=cythonize(
        [_extension(path) for path in sorted(_SOURCE.rglob("*.pyx"))],
        build_dir="build/cython",
        compiler_directives={"language_level": "3"},
    )
)
