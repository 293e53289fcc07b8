"""The Multi-Modal Hub against the authors' code, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_parts import hub_name
from mmict import MHub, MHubConfig
from mmict.hub import MODES
from torch import nn

GOLDEN = Path(__file__).parent / "golden" / "mhub_a.npz"


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items() if name != "config"}


@pytest.fixture(scope="module")
def hub(golden):
    """With the golden weights; the case begins behind the LayerNorm, and its query rows differ from pair to pair."""
    c = json.loads(str(np.load(GOLDEN)["config"]))
    hub = MHub(MHubConfig(c["width"], 40, c["nq"], c["hid"], c["L"], c["heads"], c["inter"], c["vocab"], c["maxpos"]))
    weights = {hub_name(k[3:]): v for k, v in golden.items() if k.startswith("w::")}
    found = hub.qformer.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    hub.norm = nn.Identity()
    hub.query_tokens = nn.Parameter(golden["query_embeds"])
    return hub.eval()


def given(golden, **changes):
    names = {"ids": "input_ids", "mask": "text_mask", "vision": "image_embeds", "vision_mask": "image_mask"}
    return {name: golden[key] for name, key in names.items()} | changes


@pytest.mark.parametrize(
    ("mode", "key", "rows"),
    [
        ("VT", "out_vt", slice(None)), ("VT->V", "out_vt", slice(5)), ("VT->T", "out_vt", slice(5, None)),
        ("V", "out_v", slice(None)), ("T", "out_t", slice(None)), ("QT", "out_qt_noimg", slice(None)),
        ("QT->V", "out_qt_noimg", slice(5)), ("QT->T", "out_qt_noimg", slice(5, None)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_every_mode_gives_the_authors_rows(hub, golden, mode, key, rows):
    found = hub(**given(golden), mode=mode)
    torch.testing.assert_close(found, golden[key][:, rows], atol=5e-6, rtol=0)


def test_the_golden_case_has_all_modes():
    assert len(MODES) == 8


@torch.no_grad()
def test_a_masked_text_gives_the_rows_of_the_picture_alone(hub, golden):
    """So pairs with and without a text share a call."""
    mask = golden["text_mask"].clone()
    mask[1] = 0
    found = hub(**given(golden, mask=mask), mode="VT->V")
    torch.testing.assert_close(found[1], golden["out_v"][1], atol=5e-6, rtol=0)
    torch.testing.assert_close(found[0], golden["out_vt"][0, :5], atol=5e-6, rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(hub, golden):
    more = given(
        golden,
        ids=nn.functional.pad(golden["input_ids"], (0, 2), value=3),
        mask=nn.functional.pad(golden["text_mask"], (0, 2)),
        vision=nn.functional.pad(golden["image_embeds"], (0, 0, 0, 4), value=2.0),
        vision_mask=nn.functional.pad(golden["image_mask"], (0, 4)),
    )
    torch.testing.assert_close(hub(**more, mode="VT")[:, :12], golden["out_vt"], atol=5e-6, rtol=0)


@torch.no_grad()
def test_pictures_are_normalised_first(golden):
    hub = MHub(MHubConfig(24, 40, 5, 32, 2, 4, 64, 50, 24)).eval()
    picture = golden["image_embeds"]
    plain = hub(vision=picture, mode="V")
    torch.testing.assert_close(hub(vision=5 * picture + 3, mode="V"), plain, atol=1e-4, rtol=0)
    hub.norm.weight.mul_(3)
    assert not torch.allclose(hub(vision=picture, mode="V"), plain, atol=1e-2)


def test_without_a_picture_the_next_call_still_looks_at_one(hub, golden):
    with torch.no_grad(), pytest.raises(IndexError):
        hub(golden["input_ids"] + 10_000, golden["text_mask"], mode="QT")
    with torch.no_grad():
        torch.testing.assert_close(hub(**given(golden), mode="V"), golden["out_v"], atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "mode", "message"),
    [
        ({}, "TV", "mode must be one of VT->V, .*; got 'TV'"),
        ({"ids": None}, "VT->T", "mode VT->T reads a text"),
        ({"mask": None}, "T", "mode T reads a text"),
        ({"vision": None}, "V", "mode V reads a picture"),
        ({"vision": None}, "VT->V", "mode VT->V reads a picture"),
    ],
)
def test_a_missing_input_is_named(hub, golden, changes, mode, message):
    with pytest.raises(ValueError, match=message):
        hub(**given(golden, **changes), mode=mode)


def test_a_text_that_is_too_long_is_refused(hub):
    most = hub.config.positions
    ids = torch.ones(1, most + 1, dtype=torch.long)
    with pytest.raises(ValueError, match=f"the text has {most + 1} tokens; the hub has positions for {most}"):
        hub(ids, ids, mode="T")


def test_default_sizes_are_the_authors():
    config = MHubConfig()
    assert (config.vision_width, config.lm_width, config.queries, config.hidden, config.layers) == (
        1408,
        2048,
        32,
        768,
        12,
    )
    assert (config.heads, config.intermediate, config.vocabulary, config.dropout) == (12, 3072, 30523, 0.1)
    hub = MHub(MHubConfig(24, 40, 200, 32, 4, 4, 64, 50, 24))
    assert [layer.has_cross_attention for layer in hub.qformer.encoder.layer] == [True, False, True, False]
    assert hub.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert hub.qformer.config.layer_norm_eps == 1e-12
