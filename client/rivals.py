"""The handler that compares several heads on the same held-out rows."""

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import torch
from flwr.app import Context

from fedhead.client.agreement import Agreement, agreement, empty_head
from fedhead.client.answers import Answer, of_several, shared
from fedhead.client.head_handlers import held_out_rows, outputs_of, prepare, tail_form
from fedhead.client.personal_tails import is_personal, own_outputs
from fedhead.client.site_data import Site
from fedhead.protocol.heads import HeadRequest
from fedhead.protocol.messages import MessageError, Payload
from fedhead.protocol.rivals import Level, RivalsRequest
from fedhead.sums.rivals import RivalSums
from fedhead.sums.sums import Arrays


def rivals(sites: Sequence[Site], payload: Payload, context: Context, merged: bool) -> Iterator[Answer]:
    """Sum the losses of several heads over the same held-out rows."""
    agreed = agreement(context)
    levels: dict[Level, Agreement] = {level: agreed.at(level) for level in get_args(Level)}
    expected: dict[Level, Arrays] = {level: empty_head(one) for level, one in levels.items() if level != "tail"}
    if agreed.manifest.tune:
        expected["tail"] = tail_form(sites, agreed)
    request = RivalsRequest.from_payload(payload, expected)
    if agreed.manifest.head == "none" and set(request.levels) != {"tail"}:
        raise MessageError("it compares heads, which its run does not have")
    for positions in shared(sites, merged):
        chosen = [sites[position] for position in positions]
        logits, right, targets = [], [], torch.empty(0)
        for head, level in zip(request.heads, request.levels, strict=True):
            asked, known = HeadRequest(head, server_round=0), levels[level]
            if level == "tail" and is_personal(agreed.manifest):
                outputs, targets = own_outputs(chosen, known, asked)
            else:
                ready = prepare(chosen, known, asked)
                outputs, targets = outputs_of(held_out_rows(ready), ready, known)
            logits.append(outputs)
            counted = agreed.task.counts_scores
            scores = agreed.task.loss.score(outputs, targets) if counted else torch.zeros(len(outputs))
            right.append(scores.bool().numpy())
        if agreed.task.scales_outputs:
            sums = RivalSums.from_logits(logits, targets, np.stack(right), request.temperatures, kind=agreed.task.kind)
        else:
            losses = np.stack([agreed.task.losses(one, targets).double().numpy() for one in logits])
            sums = RivalSums.from_losses(losses, np.stack(right))
        yield Answer(positions, of_several(sums.to_arrays(), len(positions)), agreed.manifest, ("held_out",))
