"""Triton kernels (Tillet et al. 2019, doi:10.1145/3315508.3329973). Importing a module here needs `triton`.

None has run on a GPU yet: they are checked in Triton's interpreter only, and nothing about their speed is known.
"""
