"""The parts of the project's metadata that depend on the machine: extensions and packages."""

import sys
from pathlib import Path

from setuptools import setup

# pip runs this file without its folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from utils.build import EXTRAS, command, extensions, requirements

setup(license="MIT", ext_modules=extensions(), cmdclass={"build_ext": command()},
      install_requires=requirements(),
      extras_require={name: list(packages) for name, packages in EXTRAS.items()})
