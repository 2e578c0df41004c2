"""The compiled parts: every .pyx below src, and the C files in csrc beside it. Without a C compiler there are none."""

from __future__ import annotations

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

_SOURCE = Path("src")


def _extension(path: Path) -> Extension:
    name = ".".join(path.relative_to(_SOURCE).with_suffix("").parts)
    return Extension(
        name,
        [str(path), *(str(c) for c in sorted((path.parent / "csrc").glob("*.c")))],
        include_dirs=[str(path.parent / "csrc")],
        depends=[str(header) for header in sorted((path.parent / "csrc").glob("*.h"))],
        extra_compile_args=["-O3", "-std=gnu11", "-pthread"],
    )


def _extensions() -> list[Extension]:
    found = cythonize(
        [_extension(path) for path in sorted(_SOURCE.rglob("*.pyx"))],
        build_dir="build/cython",
        compiler_directives={"language_level": "3"},
    )
    for extension in found:
        extension.optional = True  # cythonize forgets it
    return found


setup(ext_modules=_extensions())
