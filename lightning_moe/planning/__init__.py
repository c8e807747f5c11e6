"""The memory of a training step before training: `lightning-moe plan`.

options.py    what is planned
recipe.py     what a recipe's configuration says of them
weights.py    weights, adapters and the optimizer's states, by what they belong to
parts.py      what holds memory, by name
stand_ins.py  what the kernels and the recipe's own functions allocate
experts.py    what `moe_experts` allocates
layer.py      a decoder layer's forward and backward, counted
step.py       the whole step: `plan_memory`
cards.py      GPUs, and which options fit them
speed.py      seconds of a step by a roofline
report.py     tables and JSON
"""
