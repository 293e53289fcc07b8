from pathlib import Path

import numpy as np
import pytest
import torch
from iqa_distill.decoder import AttentionPanel

GOLDEN = Path(__file__).parent / "golden" / "decoder.npz"
OURS = {"bunch_embedding": "queries", "bunch_decoder.layers.0.": "layer.", "heads.": "head."}


def test_scores_as_deiqts_decoder():
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    weights = {name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")}
    for theirs, ours in OURS.items():
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    panel = AttentionPanel(24, 6, 6).eval()
    panel.load_state_dict(weights)
    score = panel(golden["in_cls"], golden["in_tokens"])
    torch.testing.assert_close(score, golden["out_score"][:, 0], rtol=1e-4, atol=1e-5)


def test_weights_begin_as_deiqts():
    torch.manual_seed(0)
    panel = AttentionPanel(96)
    for weight in (panel.queries, panel.layer.linear1.weight, panel.layer.self_attn.out_proj.weight, panel.head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not panel.layer.linear1.bias.any()
    assert panel.layer.linear1.bias.requires_grad
    assert panel.head.bias is None
    assert panel.layer.self_attn.in_proj_weight.std() > 0.05  # not a Linear, so it begins as torch's


def test_each_member_scores_and_learns():
    panel = AttentionPanel(12, queries=3, heads=2)
    panel(torch.randn(2, 12), torch.randn(2, 5, 12)).sum().backward()
    assert panel.queries.shape == (1, 3, 12)
    assert (panel.queries.grad.abs().sum(2) > 0).all()


@pytest.mark.parametrize(
    ("how", "message"), [({"queries": 0}, "at least 1 query"), ({"heads": 5}, "5 heads do not divide")]
)
def test_errors(how, message):
    with pytest.raises(ValueError, match=message):
        AttentionPanel(24, **how)
