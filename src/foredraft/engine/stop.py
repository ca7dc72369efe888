"""Ends outputs: at a stop string, a stop token, an end of sequence, the length limit, or before a token without a law."""

from __future__ import annotations

from collections.abc import Sequence as Items

from foredraft.core.contracts import Verdict
from foredraft.core.errors import UserError
from foredraft.core.law import TargetLaw
from foredraft.engine.request import Sequence
from foredraft.engine.scores import top_logprobs


def settle(sequence: Sequence, law: TargetLaw, tokens: Items[int], verdict: Verdict) -> None:
    """Commits the tokens of a step, up to the first token that ends the output.

    An output also ends before a token whose law does not exist; see `TargetLaw`.
    """
    nodes = [0, *verdict.path]  # the token after nodes[j] is tokens[j]
    for node, token in zip(nodes, tokens, strict=True):
        failure = law.failure(node)
        if failure is not None:
            problem = f"no token can follow token {len(sequence.token_ids)} of the text: {failure.message}"
            sequence.fail(UserError(problem, failure.hint))
            return
        scored, k = {}, sequence.sampling.logprobs
        if k is not None:
            scored = top_logprobs(law.raw_logprobs(node), token, k, sequence.tokenizer)
        sequence.token_ids.append(token)
        sequence.kinds.append("accepted" if node != nodes[-1] else verdict.kind)
        if k is not None:
            sequence.logprobs.append(scored)
            sequence.cumulative_logprob += scored[token].logprob
        _end(sequence, token)
        if sequence.finish_reason is not None:
            return


def _end(sequence: Sequence, token: int) -> None:
    """Sets `finish_reason` and `stop_reason` if `token` ends the output."""
    is_eos = token in sequence.eos_ids
    if is_eos or token in (sequence.sampling.stop_token_ids or ()):
        sequence.finish_reason, sequence.stop_reason = "stop", None if is_eos else token
        if sequence.sampling.include_stop_str_in_output:
            sequence.text.push(token, may_stop=False)
    else:
        num_output = len(sequence.token_ids) - sequence.num_prompt
        stop = sequence.text.push(token, may_stop=num_output > sequence.sampling.min_tokens)
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop
            return
        if sequence.room <= 0:
            sequence.finish_reason = "length"
    if sequence.finish_reason is not None:
        sequence.text.flush()
