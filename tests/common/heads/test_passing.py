import pytest
import torch

from fedhead.errors import UserError
from fedhead.heads import NoHead, make_head


def test_features_pass() -> None:
    head = make_head("none", 3, 3)
    assert isinstance(head, NoHead)
    assert head.trainable() == {}
    features = torch.arange(6.0).view(2, 3)
    assert head(features) is features
    with pytest.raises(UserError, match="cannot be 2 outputs"):
        make_head("none", 3, 2)
    for change in (head.fold, head.rescale):
        with pytest.raises(ValueError, match="Without a head"):
            change(torch.zeros(3), torch.ones(3))
