"""HfTensor: which tensors of a Hugging Face checkpoint a parameter is made of, and how they are laid out.

A parameter is one tensor, or several that lie side by side along one of its axes (`model.layers.Parts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

ParameterPath = tuple[Any, ...]

# How many of a parameter's first axes are inputs, and the tensors that it is made of. Matrices are stored the
# other way round there, [out …, in …], and what has no inputs as a vector; None: stored as it is. "*" is the
# number of the layer.
TENSORS: dict[ParameterPath, tuple[int | None, *tuple[str, ...]]] = {
    ("embedding",): (None, "model.embed_tokens.weight"),
    ("layers", "*", "attention_norm", "scale"): (0, "model.layers.*.input_layernorm.weight"),
    ("layers", "*", "attention", "q"): (1, "model.layers.*.self_attn.q_proj.weight"),
    ("layers", "*", "attention", "k"): (1, "model.layers.*.self_attn.k_proj.weight"),
    ("layers", "*", "attention", "v"): (1, "model.layers.*.self_attn.v_proj.weight"),
    ("layers", "*", "attention", "q_bias"): (0, "model.layers.*.self_attn.q_proj.bias"),
    ("layers", "*", "attention", "k_bias"): (0, "model.layers.*.self_attn.k_proj.bias"),
    ("layers", "*", "attention", "v_bias"): (0, "model.layers.*.self_attn.v_proj.bias"),
    ("layers", "*", "attention", "o"): (2, "model.layers.*.self_attn.o_proj.weight"),
    ("layers", "*", "attention", "q_norm", "scale"): (0, "model.layers.*.self_attn.q_norm.weight"),
    ("layers", "*", "attention", "k_norm", "scale"): (0, "model.layers.*.self_attn.k_norm.weight"),
    ("layers", "*", "mlp_norm", "scale"): (0, "model.layers.*.post_attention_layernorm.weight"),
    ("layers", "*", "mlp", "gate"): (1, "model.layers.*.mlp.gate_proj.weight"),
    ("layers", "*", "mlp", "up"): (1, "model.layers.*.mlp.up_proj.weight"),
    ("layers", "*", "mlp", "down"): (1, "model.layers.*.mlp.down_proj.weight"),
    ("final_norm", "scale"): (0, "model.norm.weight"),
    ("head",): (1, "lm_head.weight"),
}


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A parameter, or a part of one, as Hugging Face stores it: a 2-D (or 1-D) tensor [out, in].

    `view` splits that shape into our axes without moving data; `to_ours` then permutes them into our order.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    to_ours: tuple[int, ...]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], inputs: int | None) -> HfTensor:
        """The tensor `name` of what is `shape` with us, of whose axes the first `inputs` are inputs.

        What has no inputs is a vector there; None: it is stored as it is.
        """
        axes = range(len(shape))
        if inputs is None:
            return cls(name, shape, shape, tuple(axes))
        to_theirs = (*axes[inputs:], *axes[:inputs])
        view = tuple(shape[axis] for axis in to_theirs)
        outputs = math.prod(shape[inputs:])
        flat = (outputs, math.prod(shape[:inputs])) if inputs else (outputs,)
        return cls(name, flat, view, tuple(to_theirs.index(axis) for axis in axes))

    def stored_axes(self, axes: Sequence[str]) -> list[str]:
        """The logical axes of `view`, from those of ours."""
        return [axes[self.to_ours.index(axis)] for axis in range(len(axes))]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our array in Hugging Face's layout, contiguous."""
        return np.ascontiguousarray(array.transpose(np.argsort(self.to_ours))).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Source:
    """What a parameter is made of: `tensors` side by side along its axis `axis`, in this order."""

    tensors: tuple[HfTensor, ...]
    axis: int

    @classmethod
    def of(cls, path: ParameterPath, param: nnx.Param) -> Source:
        layer = next((str(key) for key in path if isinstance(key, int)), "")
        inputs, *names = TENSORS[tuple("*" if isinstance(key, int) else key for key in path)]
        axis, sizes = param.get_metadata("parts") or (0, param.shape[:1])
        tensors = tuple(
            HfTensor.of(
                name.replace("*", layer), (*param.shape[:axis], size, *param.shape[axis + 1 :]), inputs
            )
            for name, size in zip(names, sizes, strict=True)
        )
        return cls(tensors, axis)

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """A parameter's value as Hugging Face stores it: each of its tensors under its name."""
        ends = np.cumsum([tensor.view[tensor.to_ours[self.axis]] for tensor in self.tensors])
        parts = np.split(array, ends[:-1], self.axis)
        return {tensor.name: tensor.to_hf(part) for tensor, part in zip(self.tensors, parts, strict=True)}
