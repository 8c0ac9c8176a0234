"""Distil and quantise small tool-calling language models, natively in MLX.

Importing the package loads a fast BLAS before mlx is first imported (Linux only, see
:mod:`mlxkd.runtime`): afterwards would be too late. Nothing else happens at import.
"""

from mlxkd.runtime import preload_blas

__version__ = "0.1.0"

preload_blas()
