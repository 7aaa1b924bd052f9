"""A curriculum of seconds: one tiny host on digits, and one apart from it."""

from __future__ import annotations

TOML = """
name = "tiny"
summary = "for tests"
iterations = 4
groups = 2
group_size = 2
checkpoint_every = 2
rewards = ["loss=1", "rent=0.1"]
controllers = ["wait", "schedule", "heuristic"]
[core]
width = 16
layers = 1
heads = 2
[ppo]
epochs = 2
minibatch = 2
group_baseline = true
final_rate = 0.5
[imitation]
iterations = 1
epochs = 1
variants = [{}, { start = 0.0 }]
[run]
host = "cnn"
task = "digits"
epochs = 2
steps_per_epoch = 8
decisions_per_epoch = 4
batch_size = 16
decision_examples = 32
learning_rate = 4e-3
budget_params = ""
[run.settings]
plane.ramp = 0.1
[[worlds]]
name = "seen"
schedule = "conv"
run = { blueprints = { pool = ["conv", "norm", "noop"], least = 2, most = 3 } }
[worlds.vary]
"settings.cnn.widths" = ["4,6", "6,8"]
[[worlds]]
name = "unseen"
held_out = true
schedule = "conv"
run = { blueprints = ["conv", "depthwise"], settings = { cnn = { widths = "5,7" } } }
[[worlds]]
name = "dialect"
domain = "other"
apart = true
run = { blueprints = ["depthwise", "norm"], settings = { cnn = { widths = "4,4" } } }
"""
