"""Where the packages lie; everything else is in pyproject.toml.

The device code lives in kernels/triton and installs as fastkl._triton: a top-level package called
`kernels` belongs to somebody else.
"""

from setuptools import setup

setup(
    packages=["fastkl", "fastkl.backends", "fastkl._triton"],
    package_dir={"fastkl._triton": "kernels/triton"},
    package_data={"fastkl": ["py.typed"]},
)
