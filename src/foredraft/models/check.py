"""Refuses models that cannot run over token trees, by their configuration or by a trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.blocks import num_blocks
from foredraft.core.errors import UserError
from foredraft.core.tree import TreeBatch

_STATE_SPACE = "state-space (Mamba)"
_HYBRID = "hybrid attention and state-space (Mamba)"

_REFUSED = {
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "jamba": _HYBRID,
    "bamba": _HYBRID,
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "nemotron_h": _HYBRID,
    "falcon_h1": _HYBRID,
    "granitemoehybrid": _HYBRID,
    "rwkv": "recurrent (RWKV)",
    "recurrent_gemma": "recurrent (RG-LRU)",
    "xlstm": "recurrent (xLSTM)",
    "bloom": "ALiBi attention",
    "mpt": "ALiBi attention",
    "gpt_neo": "local attention",
    "llama4": "chunked attention",
    "llama4_text": "chunked attention",
}
"""``model_type`` that cannot run over trees -> the kind of layer that prevents it.

In a tree, masks and biases must follow the depth of a node. The causal mask of `gpt_neo`, the bias of ALiBi and the ends of
chunks follow the index in the sequence instead.
"""

_ATTENTION = {"full_attention", "sliding_attention", "attention", "global", "moe"}
"""Types of layers that are softmax attention or have no state."""

_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
"""Configuration keys that list the types of the layers."""


def refuse_unsupported(config: Any) -> None:
    """Refuses a configuration that is known not to run over token trees. Does not change it.

    Raises:
        ValueError: the model has such layers. The message names their type.
    """
    text = config.get_text_config(decoder=True)
    reason = _refused_layer(config, text)
    if reason:
        raise UserError(
            f"cannot run model type {config.model_type!r} over token trees because of its {reason} layers",
            "choose a model with softmax attention and rotary or learned positions",
        )


def _refused_layer(config: Any, text: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    for part in (config, text):
        if part.model_type in _REFUSED:
            return _REFUSED[part.model_type]
    for name in _LAYER_LISTS:
        other = sorted({str(kind) for kind in getattr(text, name, None) or []} - _ATTENTION)
        if other:
            return " and ".join(kind.replace("_", " ") for kind in other)
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        return "ALiBi attention"
    if getattr(text, "use_bidirectional_attention", False) is True:
        return "bidirectional attention"
    return "chunked attention" if getattr(text, "attention_chunk_size", None) else None


_CHECK_PARENTS = (-1, 0, 0, 1, 2, 1, 3, 0, 3, 6, 4, 9)
"""Parents of the self-check's tree. It branches at several depths, and some children do not directly follow their parent."""


def self_check(target: Any) -> None:
    """Checks that a target gives the same logits in a random tree as on each path of the tree, run as a plain chain.

    The tree runs in two parts, beside a shorter request, which also checks batching, padding and `start`. If the target has a
    method `plain`, as `HFTarget` does, its logits are compared too. The check runs in the target's dtype and does not change
    the target.

    Raises:
        ValueError: the logits differ by more than rounding, or the target cannot run a tree.
    """
    window = getattr(target.config, "sliding_window", None) or 0
    length = max(1, min(window + 4 if window <= 64 else 8, target.max_len - len(_CHECK_PARENTS)))
    rng = np.random.default_rng(0)
    prompt = rng.integers(target.vocab_size, size=length).tolist()
    tokens = rng.permutation(max(target.vocab_size, 12))[:12] % target.vocab_size
    name = f"model type {getattr(target.config, 'model_type', type(target).__name__)!r}"
    try:
        errors = _path_errors(target, prompt, tokens.tolist())
    except Exception as error:
        raise UserError(f"cannot run {name} over token trees ({type(error).__name__}: {error})") from error
    # In half precision rounding may change the experts of some nodes in a mixture model, so only the median is compared.
    error = float(np.median(errors) if torch.finfo(target.dtype).bits < 32 else errors.max())
    if not error <= _tolerance(target.dtype):
        raise UserError(
            f"cannot run {name} over token trees: its logits in a tree differ from those on its single paths by {error:.2g} "
            f"of their size in {target.dtype}",
            "choose a model with softmax attention and rotary or learned positions",
        )


def _path_errors(target: Any, prompt: list[int], tokens: list[int]) -> Float[np.ndarray, " n"]:
    """Returns the relative difference of the logits at each node of each path."""
    in_tree = _run_check_tree(target, prompt, tokens)
    tree = TreeBatch.chains([tokens], [_CHECK_PARENTS])[0]
    paths = [[0, *tree.path_to(leaf)] for leaf in range(tree.num_nodes) if not tree.children[leaf]]
    chains = [prompt + [tokens[i] for i in path] for path in paths]
    batch = TreeBatch.chains(chains)
    pool = target.new_pool(num_blocks(max(map(len, chains)), len(chains)))
    alone = target.forward(batch, [pool.allocate() for _ in chains]).logits
    plain = getattr(target, "plain", None)
    errors = []
    for b, path in enumerate(paths):
        end = int(batch.offsets[b + 1])
        errors.append(_relative_error(in_tree[path], alone[end - len(path) : end]))
        if plain is not None:
            errors.append(_relative_error(in_tree[path], plain(chains[b])[-len(path) :]))
    return torch.cat(errors).cpu().numpy()


def _run_check_tree(target: Any, prompt: list[int], tokens: list[int]) -> Float[Tensor, "n v"]:
    """Returns the logits at the nodes of the tree. It runs in two parts, beside a chain of the prompt's first token."""
    pool = target.new_pool(num_blocks(len(prompt) + len(tokens), 2))
    caches = [pool.allocate(), pool.allocate()]
    target.forward(TreeBatch.chains([prompt]), caches[1:], rows=np.arange(0))
    pool.keep(caches[1:], [range(1, len(prompt))])
    part = len(tokens) // 2
    first = TreeBatch.chains([prompt[:1], tokens[:part]], [[-1], _CHECK_PARENTS[:part]])
    whole = TreeBatch.chains([prompt[:1] * 2, tokens], [[-1, 0], _CHECK_PARENTS])
    head = target.forward(first, caches).logits[1:]
    tail = target.forward(whole, caches, rows=np.arange(2 + part, 2 + len(tokens)), start=[1, part]).logits
    return torch.cat([head, tail])


def _relative_error(logits: Float[Tensor, "n v"], reference: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    difference = (logits - reference).double().norm(dim=-1)
    return difference / reference.double().norm(dim=-1).clamp_min(1e-6)


def agree(logits: Float[Tensor, "n v"], reference: Float[Tensor, "n v"]) -> bool:
    """Returns whether two results for the same logits differ by rounding at most."""
    return bool((_relative_error(logits, reference) <= _tolerance(logits.dtype)).all())


def _tolerance(dtype: torch.dtype) -> float:
    """Returns the largest relative difference that counts as rounding.

    Over 32 random layers in bfloat16 the median difference was below 2 eps, and above 5 eps without a mask. The lower bound of
    1e-4 is for models that compute norms in float32 in every dtype.
    """
    return max(4 * torch.finfo(dtype).eps, 1e-4)
