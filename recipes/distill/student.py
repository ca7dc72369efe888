"""The student: a small Llama with the target's vocabulary, and how far its laws are from the target's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foredraft.models.llama import LlamaTarget

from .batches import Batch, Row, collate, epoch

SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""Sizes of the student. It has a ninth of the bundled target's multiply-adds per token, half of them in the output layer."""

LOGITS_CHUNK = 256
"""Number of rows of logits that are computed together. In float32 they take 4 MB at a vocabulary of 4096, and fit in the
cache."""


def new_student(target: LlamaTarget) -> LlamaForCausalLM:
    """Makes a student with random layers. Its embedding is the target's, projected on its principal directions."""
    shared = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "rms_norm_eps", "rope_parameters")
    taken = {key: getattr(target.config, key) for key in shared}
    student = LlamaForCausalLM(LlamaConfig(**SHAPE, **taken, tie_word_embeddings=True))
    student.set_attn_implementation("eager")  # takes half the time of the fused one on a CPU, forward and backward
    embedding = target.embed(torch.arange(target.vocab_size)).float()
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[: SHAPE["hidden_size"]]
    student.lm_head.weight.data.copy_(embedding @ directions.T)
    return student


class Distance(NamedTuple):
    """Distance of the student's distribution p from the target's distribution q, at n positions.

    Attributes:
        kl: KL(q || p).
        acceptance: sum_x min(p, q) = 1 - TV(p, q), the acceptance of speculative sampling with one draft at temperature 1.
    """

    kl: Float[Tensor, " n"]
    acceptance: Float[Tensor, " n"]


def distance(student_logits: Float[Tensor, "n v"], target_logits: Float[Tensor, "n v"]) -> Distance:
    """Computes the distance of the student's distributions from the target's."""
    p, q = student_logits.log_softmax(-1), target_logits.log_softmax(-1)
    return Distance(torch.linalg.vecdot(q.exp(), q - p), torch.minimum(p.exp(), q.exp()).sum(-1))


def hidden_states(student: LlamaForCausalLM, batch: Batch) -> Float[Tensor, "n d"]:
    """Computes the student's final states at the positions of a batch with a positive weight."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = student.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden[batch.weights > 0].float()


def student_head(student: LlamaForCausalLM, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """Computes the student's logits, multiplied in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return student.lm_head(hidden).float()


@torch.no_grad()
def evaluate(student: LlamaForCausalLM, target: LlamaTarget, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Computes the mean metrics over the positions of the answers, for each kind of text."""
    means = {}
    for kind in sorted({row.kind for row in rows}):
        batches = [collate(group, prompt_weight=0.0) for group in epoch([row for row in rows if row.kind == kind], seed=0)]
        columns = [measured(student, target, batch) for batch in batches]
        figures = torch.cat(columns, dim=1)
        kl, acceptance, agreement = (round(figure, 4) for figure in figures.mean(1).tolist())
        means[kind] = {"kl": kl, "acceptance": acceptance, "top1_agreement": agreement, "positions": figures.shape[1]}
    return means


def measured(student: LlamaForCausalLM, target: LlamaTarget, batch: Batch) -> Float[Tensor, "3 n"]:
    """Computes KL divergence, acceptance and agreement of the most likely token, at the positions with a positive weight."""
    hidden, features, columns = hidden_states(student, batch), batch.features[batch.weights > 0], []
    for states, wanted in zip(hidden.split(LOGITS_CHUNK), features.split(LOGITS_CHUNK), strict=True):
        logits, target_logits = student_head(student, states), target.head(wanted).float()
        agreement = (logits.argmax(-1) == target_logits.argmax(-1)).float()
        columns.append(torch.stack((*distance(logits, target_logits), agreement)))
    return torch.cat(columns, dim=1)
