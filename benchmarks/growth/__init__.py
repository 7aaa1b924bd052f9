"""Does growing pay? Protocols P1 to P7, each one command: `python -m benchmarks.growth p2`.

A protocol can be stopped and called again: what is done is not run again. Its figures go to `results/`, and
`docs/growth.md` says what they mean.
"""
