"""Every operation of kernels/ against its reference and the naive way: ``python benchmarks/kernels.py --help``.

All of it is in `kernel_speed`. Transformers, in the process of `worker_peft`, imports any module called `kernels` that
it can see, and refuses one without a version: so there is nothing here that another environment could lack.
"""

__version__ = "0.0.0"

if __name__ == "__main__":
    import sys

    from kernel_speed import main

    main(sys.argv[1:])
