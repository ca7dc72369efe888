"""Builds the compiled kernels, see src/foredraft/kernels/build.py. Everything else stands in pyproject.toml.

Without a C compiler, the package installs without them, and torch computes.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NAME = "foredraft.kernels._kernels"
building = runpy.run_path(str(Path(__file__).parent / "src" / "foredraft" / "kernels" / "build.py"))


class BuildKernels(build_ext):
    """Builds the library, which is no Python extension: it works with every version of Python."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Returns the path of the library inside the package."""
        return ext_name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Builds the library. Says which instruction sets were left out."""
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            left_out = building["build"](out)
        except building["BuildError"] as error:
            raise CompileError(f"no compiled kernels, so torch will compute, which is slower: {error}") from None
        if left_out:
            self.warn(f"kernels left out, because the compiler does not know them: {', '.join(left_out)}")


class TaggedWheel(bdist_wheel):
    """A wheel for any Python 3: for this platform if it holds the kernels, else for every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tags of Python, its ABI and the platform."""
        build = self.get_finalized_command("build_ext")
        return "py3", "none", self.platform() if Path(build.get_ext_fullpath(NAME)).exists() else "any"

    def platform(self) -> str:
        """Returns the tag of this platform or, if ``CC`` is a cross compiler of Linux, of the one that it builds for."""
        tag, machine = super().get_tag()[2], building["architecture"](building["compiler"]())
        is_other = tag.startswith("linux_") and machine in building["SETS"] and not tag.endswith(f"_{machine}")
        return f"linux_{machine}" if is_other else tag


setup(
    ext_modules=[Extension(NAME, [], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TaggedWheel},
)
