"""Figures of several GPUs: agreement, scaling, a GPT of 1.2B that deepens. `python -m benchmarks.several_gpus`."""
