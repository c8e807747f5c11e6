"""Every reason why something is not supported: a code for programs and a message for people, in one list.

Control flow looks at codes, or at whether there is a reason; never at words.
"""

from dataclasses import dataclass
from typing import Any

# Messages by code; what stands in braces is named where the reason arises.
REASONS = {
    # Why a layer runs the default implementation.
    "down_proj_bias": 'down_proj has a bias and down_bias="fallback" asks for the default implementation',
    "dropout": "dropout inside the experts would differ when the activation is recomputed",
    "instance_forward": "the module has a forward of its own, such as accelerate's or expert parallelism's",
    "missing_attribute": "{what}",
    "not_a_tensor": "{names} is not a tensor",
    "other_registry": "the class dispatches through a registry of its own, such as quantized experts",
    "outside_registry": "{class_name} does not go through Transformers' experts registry: {why}",
    "parametrized": (
        "{name} is parametrized by {parametrization}, such as a quantized weight: backward would save a dense copy"
    ),
    "post_expert_norm": "a norm stands between the down projection and the routing weight",
    "replaced_forward": "another library replaced the module's forward (with Liger, apply it with swiglu=False)",
    "tensor_class": "{name} is a {tensor_class}, such as a quantized weight, and not a plain tensor",
    "trained_parameters": "the module trains parameters that the operation does not know: {names}",
    "undeclared_bias": "the module has {names}, and its class says that it has no bias",
    "undecorated_forward": "the class's forward does not carry Transformers' decorator, or carries another one",
    "weights": "{problem}",
    # Why PEFT merges an adapter into the weight.
    "lora_added_later": "the adapter on {name} was put on after patch_moe; patch again",
    "lora_factors": "the factors of adapter {adapter!r} on {name} are not plain linear layers",
    "lora_forward": "the wrapper of the adapter on {name} has a forward of its own, or another library's",
    "lora_inner_forward": "another library replaced a forward inside the adapter on {name}",
    "lora_layer_falls_back": "the layer runs the default implementation",
    "lora_parameter": "the adapter on {name} has no low-rank form: only {known} have",
    "lora_parametrized": "{name}, which has an adapter, has another parametrization",
    "lora_scaling": "the scaling of adapter {adapter!r} on {name} is a tensor, which may be trained",
    "lora_transposed": "PEFT reads another layout (is_transposed) off the module with the adapter on {name}",
    "lora_variant": "adapter {adapter!r} on {name} is a variant of LoRA, or has a bias",
    "peft_layout": "the adapters on experts cannot be read out of PEFT {version}: {why}",
    # Why an adapter of PEFT would train wrongly, whichever implementation runs.
    "lora_over_parametrization": (
        "{name} is parametrized by {parametrization}, and over a parametrized weight LoRA of PEFT {version} is broken: "
        "its second forward in training raises, without gradients each forward adds the update once more, and merging "
        "changes nothing"
    ),
    "lora_over_quantized": (
        "{name} holds quantized values ({dtype}), and PEFT {version} adds the update to them before they are scaled: "
        "the adapter would train next to nothing"
    ),
    # Why a training step is not captured in a CUDA graph.
    "graph_batch": "{name} in the batch is {what}, which a replay cannot follow",
    "graph_compiled": "the step is being compiled",
    "graph_device": "CUDA graphs need the current GPU, and this is on {device}",
    "graph_failed": "it cannot be captured: {error}",
    "graph_hook": "{hook} on {module} runs Python at each call, which a replay would leave out",
    "graph_memory": "there is no memory for it beside what is held: {error}",
    "graph_ranks": "{world_size} ranks train, and what they communicate is not captured",
    "graph_shapes": "batches have more than {num_shapes} shapes: pack documents to a fixed length",
    "graph_slower": "a replay takes {replay:.3f} s and the step by itself {eager:.3f} s",
    # Why ranks would train apart.
    "not_sharded": (
        "{world_size} ranks train, and the model {how}: each would silently train an unsynchronized replica. Give the "
        "strategy ModelParallelStrategy(data_parallel_size={world_size}, tensor_parallel_size=1), whose default is one "
        'data-parallel rank for each node, and shard over device_mesh["data_parallel"] in configure_model'
    ),
}


@dataclass(frozen=True)
class Unsupported:
    """A reason why something is not supported.

    Attributes:
        code: its key in `REASONS`.
        message: what a user reads.
    """

    code: str
    message: str

    def __str__(self) -> str:
        """The message with its code."""
        return f"{self.message} [{self.code}]"


def unsupported(code: str, **named: Any) -> Unsupported:
    """The reason of that code.

    Args:
        code: a key of `REASONS`.
        named: what its message names.
    """
    return Unsupported(code, REASONS[code].format(**named))
