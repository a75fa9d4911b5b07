"""Benchmarks: errors of the solvers (`solver`), the time of a step (`step`), and all that needs a GPU (`gpu`).

Examples:
    python recipes/benchmark.py solver --preset mlp-5x2000 --data-root data
    python recipes/benchmark.py step --preset resnet50 --amp --channels-last --fused --capture
    python recipes/benchmark.py gpu --out runs/gpu
"""

import sys

if __name__ == "__main__":
    # Each command imports what it needs: a machine with a GPU often has torch and little else.
    if sys.argv[1:2] == ["gpu"]:
        from lib.gpu_benchmark import main

        sys.exit(main(sys.argv[2:]))
    from lib.benchmarks import run_command

    run_command(__doc__)
