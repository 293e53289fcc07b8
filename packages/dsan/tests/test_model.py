import numpy as np
import pytest
import torch
from dsan import DSAN, DoubleSupervisionLoss
from dsan.model import attention_greedy
from PIL import Image
from torch import nn

BACKBONES = {"tiny": [8, 8, 16, 16], "base": [32], "vgg": [32]}


def small(backbone="tiny", seed=0, **options):
    """Untrained, but with masks and batch statistics that are not flat."""
    torch.manual_seed(seed)
    model = DSAN(backbone, widths=BACKBONES.get(backbone), hidden=8, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            nn.init.normal_(module.bias, 0, 0.3)
    if model.attention is not None:
        nn.init.normal_(model.attention.mask.weight)
    return model.eval()


@pytest.mark.parametrize(("backbone", "frames"), [("tiny", 25), ("base", 26), ("vgg", 24), ("timm/resnet10t", 25)])
def test_shapes(backbone, frames):
    model = small(backbone)
    output = model(torch.zeros(2, 1, 32, 100), branches="both")
    assert output.context.shape == output.enhancement.shape == (2, frames, 37)
    assert output.attention.shape == (2, 1, 8, 25)
    assert model.frames(100) == frames
    assert model(torch.zeros(2, 1, 32, 100)).enhancement is None
    assert model(torch.zeros(2, 1, 32, 100), branches="enh").context is None
    assert model.train()(torch.zeros(2, 1, 32, 100)).enhancement is not None


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("context", ["ctc", "attn"])
def test_a_crop_alone_equals_the_crop_in_any_batch(backbone, context):
    model = small(backbone, context=context, max_length=4).double()
    widths = [37, 100, 64, 17, 130, 16]
    crops = [torch.randn(1, 32, w, dtype=torch.float64) for w in widths]
    batch = torch.full((len(widths), 1, 32, 132), 7.0, dtype=torch.float64)
    for row, crop in zip(batch, crops, strict=True):
        row[..., : crop.shape[2]] = crop
    with torch.no_grad():
        together = model(batch, torch.tensor(widths), branches="both")
        for i, crop in enumerate(crops):
            padded = nn.functional.pad(crop, (0, -widths[i] % 4), value=-3.0)[None]
            alone = model(padded, torch.tensor([widths[i]]), branches="both")
            n = int(alone.lengths)
            assert n == int(together.lengths[i]) == model.frames(widths[i])
            for ours, theirs in ((alone.context, together.context), (alone.enhancement, together.enhancement)):
                m = n if ours is alone.enhancement or context == "ctc" else 5
                torch.testing.assert_close(theirs[i, :m], ours[0, :m], atol=1e-9, rtol=1e-9)
            if widths[i] % 4 == 0:  # nothing to mask
                torch.testing.assert_close(model(crop[None]).context[0, :m], alone.context[0, :m], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backbone", ["tiny", "timm/resnet10t"])
def test_reading_does_not_depend_on_the_others(backbone):
    model = small(backbone, keep_ratio=True)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, w), dtype=np.uint8) for w in (200, 40, 90, 91, 300, 12)]
    together = model.read(images, batch_size=4)
    for image, reading in zip(images, together, strict=True):
        (alone,) = model.read([image])
        assert (alone.text, alone.scores) == (reading.text, pytest.approx(reading.scores, abs=1e-5))


def test_parts_share_their_weights():
    full, base = small(seed=3), small(seed=3, attention=False, enhancement=None)
    torch.testing.assert_close(
        full.backbone.state_dict() | full.context.state_dict(), base.backbone.state_dict() | base.context.state_dict()
    )


def test_the_enhancement_branch_knows_no_context():
    model = small().train()
    output = model(torch.randn(4, 1, 32, 100))
    output.enhancement.square().mean().backward()
    assert all(p.grad is None for p in model.context.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_weight_0_is_the_base_network_to_the_bit():
    def steps(model, branches, weight):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            output = model(torch.randn(4, 1, 32, 100), branches=branches)
            loss = DoubleSupervisionLoss(weight)(
                output.context, output.enhancement, torch.tensor([1, 2, 3, 4]), torch.ones(4, dtype=torch.int64)
            )
            optimizer.zero_grad()
            loss.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        return model.context.state_dict() | model.backbone.state_dict()

    base = steps(small(enhancement=None).train(), "both", 1.0)
    zero = steps(small().train(), "ctx", 0.0)
    assert all(torch.equal(base[name], zero[name]) for name in base)
    other = steps(small().train(), "both", 1.0)
    assert not all(torch.equal(base[name], other[name]) for name in base)


@pytest.mark.parametrize("enhancement", ["ctc", "attn"])
def test_fuse_takes_the_surer_branch(enhancement):
    model = small(enhancement=enhancement, max_length=5)
    images = [np.random.default_rng(i).integers(0, 255, (32, 100), dtype=np.uint8) for i in range(12)]
    nn.init.normal_(model.context.head.weight)
    ctx, enh, fused = (model.read(images, decode=d) for d in ("ctx", "enh", "fuse"))
    assert {r.branch for r in ctx} == {"ctx"}
    assert {r.branch for r in enh} == {"enh"}
    for c, e, f in zip(ctx, enh, fused, strict=True):
        assert f == (e if e.certainty > c.certainty else c)


def test_lexicon_and_beam():
    model = small()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 60), dtype=np.uint8))
    assert model.read([image], search="lexicon", lexicon=["Quay", "street"])[0].text in ("quay", "street")
    assert len(model.read([image], search="beam", beam_width=3)) == 1


def test_attention_decoders_are_fed_the_word():
    model = small(context="attn", max_length=6).train()
    images, targets = torch.randn(2, 1, 32, 100), (torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
    fed = model(images, targets=targets).context
    assert fed.shape == (2, 7, 38)
    other = model(images, targets=(torch.tensor([9, 2, 3]), torch.tensor([2, 1]))).context
    torch.testing.assert_close(fed[:, 0], other[:, 0])  # the first step has seen nothing
    assert not torch.allclose(fed[0, 1:], other[0, 1:])


def test_attention_greedy_stops_at_the_end_or_takes_all():
    charset = small().charset
    ids = [[12, 13, 1, 14], [12, 13, 14, 15], [1, 12, 12, 12], [12, 0, 13, 1]]
    logits = 9.0 * nn.functional.one_hot(torch.tensor(ids), 38)
    assert [r.text for r in attention_greedy(logits, charset)] == ["ab", "abcd", "", "ab"]


def test_attention_map():
    model = small()
    found = model.attention_map(torch.randn(2, 1, 32, 100))
    assert found.shape == (2, 32, 100)
    assert ((found > 0) & (found < 1)).all()
    with pytest.raises(ValueError, match="no text attention"):
        small(attention=False).attention_map(torch.randn(2, 1, 32, 100))


def test_saved_and_loaded(tmp_path):
    model = small(keep_ratio=True, characters="ab é".replace(" ", ""), enhancement=None)
    model.save_pretrained(tmp_path)
    again = DSAN.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 1, 32, 64)
    torch.testing.assert_close(again(images).context, model(images).context)
    assert again.charset.characters == "abé"
    assert again.size == model.size
    assert again.enhancement is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "frame"}, "context must be ctc or attn"),
        ({"enhancement": "x"}, "enhancement must be one of"),
        ({"height": 48}, "images must be 32 high"),
        ({"width": 8}, "at least 16 wide"),
        ({"channels": 2}, "channels must be 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DSAN(**options)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"decode": "both"}, "decode must be one of"),
        ({"search": "best"}, "search must be one of"),
        ({"decode": "enh"}, "has no enhancement branch"),
        ({"search": "lexicon"}, "come together"),
        ({"search": "beam"}, "needs CTC"),
    ],
)
def test_readings_that_cannot_be_had(how, message):
    model = small(enhancement=None, context="attn")
    with pytest.raises(ValueError, match=message):
        model.read([np.zeros((32, 100), np.uint8)], **how)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match=r"images are \(1, 3, 32, 100\): expected \(batch, 1, 32, at least 16\)"):
        small()(torch.zeros(1, 3, 32, 100))
    with pytest.raises(OSError, match=r"no/such\.png"):
        small().read(["no/such.png"])
