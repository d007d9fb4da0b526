"""Builds the extensions: the public functions, and one kernel source for each CPU level. Everything else is in pyproject.toml.

CBN_OPENMP=on requires OpenMP, =off leaves it out; by default it is used if a program that uses it compiles and links. CBN_CFLAGS are options for the
compiler that come after all others.
"""

import glob
import os
import re
import sys
import sysconfig
import tempfile

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = re.search("x86_64|amd64", sysconfig.get_platform())       # that is built for, also by a cross compiler; universal2 has the baseline alone
LEVELS = {"baseline": []}
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"]

ELEMENTS = ["float32", "float64", "float16", "bfloat16"]        # as CBN_ELEMENT of lanes.h counts

# Multiply-adds stay two roundings, so that every CPU level gives the same bits.
FLAGS = ["-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]

# Of kernels, and of compilers that know them. Lanes are vectors already: what else is made of loops and of neighbouring numbers is longer, and slower.
# A loop that copies a few values stays one: `rep movs` takes longer.
LANES_ALONE = ["-fvect-cost-model=very-cheap", "-fno-ipa-cp-clone", "-fno-tree-slp-vectorize", "-fno-tree-loop-distribute-patterns",
               "--param=max-completely-peel-times=4"]  # fmt: skip
if sys.platform == "win32":
    LANES_ALONE.append("-Wa,-muse-unaligned-vector-move")       # on a stack that gcc takes for aligned to 32 bytes, where it is to 16

# How compilers are asked for OpenMP, and linkers; the second way is that of Apple's clang, which has no library of its own.
OPENMP = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]

CYTHON = {
    "nthreads": os.cpu_count() or 1,
    "build_dir": "build",
    "compiler_directives": {
        "language_level": 3,
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "initializedcheck": False,
        "embedsignature": True,
        "freethreading_compatible": True,
    },
}


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        if sys.platform == "win32" and self.compiler is None:
            self.compiler = "mingw32"       # Microsoft's knows neither the vectors' attributes nor POSIX threads

    def run(self):
        """Cython's part comes only now: an sdist needs none, and would leave here the C of another NumPy."""
        translated = {extension.name: extension for extension in cythonize(self.extensions, **CYTHON)}
        for extension in self.extensions:
            extension.sources, extension.depends = translated[extension.name].sources, translated[extension.name].depends
        super().run()

    def build_extensions(self):
        openmp, openmp_libraries = self.openmp_flags()
        known = [flag for flag in LANES_ALONE if self.builds("int main(void) { return 0; }\n", [flag, "-Werror"])]
        last = os.environ.get("CBN_CFLAGS", "").split()
        for extension in self.extensions:
            speed = ["-O3", *known] if extension.name.startswith("cbn.kernels") else ["-O2"]        # which is as fast there, and smaller
            extension.extra_compile_args += FLAGS + speed + openmp + last
            extension.extra_link_args += openmp_libraries
        self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()

    def builds(self, program, flags, link_flags=()):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write(program)
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, os.path.join(folder, "probe"), extra_postargs=list(link_flags or flags))
            except Exception:
                return False
            return True

    def openmp_flags(self):
        wanted = os.environ.get("CBN_OPENMP", "auto")
        if wanted == "off":
            return [], []
        for flags, libraries in OPENMP:
            if self.builds("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n", flags, libraries):
                return flags, libraries
        if wanted == "on":
            raise SystemExit("CBN_OPENMP=on, but no program with OpenMP could be built")
        print("cbn: this compiler has no OpenMP; building the serial package")
        return [], []


def extension(name, flags=(), element=0):
    own = ["cbn/kernels/*.pxi"] if name.startswith("cbn.kernels") else ["cbn/*.pxi", "cbn/*.h"]
    return Extension(
        name,
        [name.replace(".", "/") + ".pyx"],
        include_dirs=[numpy.get_include(), "cbn", "cbn/kernels"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"), ("CBN_ELEMENT", str(element))],
        extra_compile_args=list(flags),
        depends=[path for pattern in ["cbn/kernels/*.h", *own] for path in glob.glob(pattern)],
    )


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[extension(f"cbn.{name}") for name in ("dispatch", "threads", "memory", "native", "capi", "functional", "onnx.runtime")]
    + [
        extension(f"cbn.kernels.{level}_{name}", flags + ["-DCYTHON_INLINE=inline __attribute__((always_inline))"], element)
        for level, flags in LEVELS.items()
        for element, name in enumerate(ELEMENTS)
    ],
)
