"""The memory of a training step before training: `lightning-moe plan`.

options.py      what is planned
sources.py      configurations: of a hub name, a folder, a file, a recipe
weights.py      weights, adapters and the optimizer's states, by what they belong to
allocations.py  counts what a computation on the meta device would allocate
stand_ins.py    what the kernels and the recipe's own functions allocate
layer.py        a decoder layer's forward and backward, counted
step.py         the whole step: `plan_memory`
cards.py        GPUs: memory, speed, which options fit
table.py        for a terminal
"""
