import pytest
import torch
import torch.nn.functional as F
from disco import ContrastiveHead, DisCoLoss, rkd_loss, seed_loss
from disco.loss import distillation, unit
from tiny_vision import golden


def rows(count, dim=16, seed=0, dtype=torch.float32):
    return unit(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def eager_contrast(queries, keys, queue, temperature):
    """The authors' form: one matrix of batch x (1 + queue), the positive in column 0."""
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_the_head_is_the_authors_cross_entropy(temperature):
    head = ContrastiveHead(16, 100, temperature, torch.Generator().manual_seed(1)).double()
    queries, keys = rows(7, seed=2, dtype=torch.float64).requires_grad_(), rows(7, seed=3, dtype=torch.float64)
    loss = head(queries, keys)
    expected = eager_contrast(queries, keys, head.queue.keys, temperature)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, queries), torch.autograd.grad(expected, queries), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_keys_and_queue_get_no_gradient():
    head, queries, keys = ContrastiveHead(16, 32), rows(4).requires_grad_(), rows(4, seed=1).requires_grad_()
    head(queries, keys).backward()
    assert keys.grad is None
    assert queries.grad is not None
    assert not head.queue.keys.requires_grad


def test_enqueuing_before_backward_changes_no_gradient():
    gradients = []
    for early in (False, True):
        head, queries = ContrastiveHead(16, 8, generator=torch.Generator().manual_seed(0)), rows(4).requires_grad_()
        loss = head(queries, rows(4, seed=1))
        if early:
            head.enqueue(rows(4, seed=1))
        loss.backward()
        gradients.append(queries.grad)
    assert torch.equal(*gradients)


def test_enqueue_wraps_around():
    head = ContrastiveHead(16, 5)
    first, second = rows(3, seed=1), rows(4, seed=2)
    head.enqueue(first)
    head.enqueue(second)
    expected = torch.cat([second[2:], first[2:3], second[:2]])
    assert torch.equal(head.queue.keys, expected)
    assert head.queue.pointer == 2


@pytest.mark.parametrize("temperature", [0.0, -0.2])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        ContrastiveHead(8, 8, temperature)


def test_queue_must_hold_a_key_and_the_batch():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ContrastiveHead(8, 0)
    with pytest.raises(ValueError, match=r"keys \(5, 8\) do not fit a memory bank of 4 x 8"):
        ContrastiveHead(8, 4).enqueue(rows(5, 8))


def test_zero_and_half_precision_embeddings_stay_finite():
    for dtype in (torch.float16, torch.float32):
        student = torch.zeros(2, 8, dtype=dtype).requires_grad_()
        output = DisCoLoss(8, 16)(unit(student), unit(student), rows(2, 8), rows(2, 8, 1), rows(2, 8, 2))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert unit(student).dtype == torch.float32
    assert torch.isfinite(student.grad).all()


def test_small_temperature_under_autocast_is_computed_in_float32():
    queries, keys = rows(4), rows(4, seed=1)
    head = ContrastiveHead(16, 32, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(queries, keys)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(queries, keys))


def test_distillation_of_unit_rows_is_a_cosine_regression():
    student, teacher = rows(6, seed=1, dtype=torch.float64), rows(6, seed=2, dtype=torch.float64)
    cosine = F.cosine_similarity(student, teacher)
    torch.testing.assert_close(distillation(student, teacher), (2 - 2 * cosine).mean())
    torch.testing.assert_close(distillation(student, teacher, "sum"), F.mse_loss(student, teacher, reduction="sum"))


@pytest.mark.parametrize("batch", [4, 12])
def test_default_weight_does_not_depend_on_the_batch(batch):
    """The authors' sum grows with the batch of a device; the mean does not (section 3.5 of the specification)."""
    one = [rows(1, seed=s) for s in range(5)]
    several = [r.expand(batch, -1) for r in one]
    mean, total = DisCoLoss(16, 32), DisCoLoss(16, 32, distill_weight=1.0, distill_reduction="sum")
    total.load_state_dict(mean.state_dict())
    torch.testing.assert_close(mean(*several).loss, mean(*one).loss)
    torch.testing.assert_close(total(*several).distill, batch * mean(*one).distill)
    if batch == 4:
        assert mean.distill_weight == 32


def test_authors_weight_of_32_is_8_devices_of_32_images():
    """Mean over the global batch with weight B / W equals the average over W devices of their sums."""
    devices, images = 8, 32
    student, teacher = rows(devices * images, seed=1), rows(devices * images, seed=2)
    parts = [distillation(s, t, "sum") for s, t in zip(student.chunk(devices), teacher.chunk(devices), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), 32 * distillation(student, teacher))


def test_only_mse_needs_no_keys():
    loss = DisCoLoss(16, contrast_weight=0.0, distill_weight=1.0)
    s, t = rows(4), rows(4, seed=1)
    assert loss.contrast is None
    torch.testing.assert_close(loss(s, s, t, t).loss, 2 * distillation(s, t))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill_reduction": "max"}, "distill_reduction must be one of mean, sum; got 'max'"),
        ({"distill_weight": -1.0}, "weights must be at least 0; got -1.0 and 1.0"),
        ({"contrast_weight": -1.0}, "weights must be at least 0"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        DisCoLoss(8, 8, **change)


def test_widths_must_be_equal_and_keys_given():
    with pytest.raises(ValueError, match="the student's embeddings are 16 wide and the teacher's 8"):
        DisCoLoss(16, 8)(rows(4), rows(4), rows(4, 8), rows(4, 8), rows(4))
    with pytest.raises(ValueError, match="needs keys, or contrast_weight=0"):
        DisCoLoss(16, 8)(*(rows(4) for _ in range(4)))


@pytest.mark.parametrize(("part", "weights"), [("dist", (1.0, 0.0)), ("angle", (0.0, 1.0))])
def test_rkd_equals_the_authors(part, weights):
    case = golden("rkd")
    student = case["student"].requires_grad_()
    loss = rkd_loss(student, case["teacher"], *weights)
    assert loss.item() == pytest.approx(case[part], rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], case[f"grad_{part}"], rtol=1e-4, atol=1e-6)


def test_rkd_literally():
    student, teacher = rows(5, seed=1, dtype=torch.float64), rows(5, 7, seed=2, dtype=torch.float64)

    def distances(x):
        d = torch.tensor([[float((a - b).norm()) for b in x] for a in x], dtype=x.dtype)
        return d / d[d > 0].mean()

    def angles(x):
        out = torch.zeros(5, 5, 5, dtype=x.dtype)
        for i in range(5):
            for j in range(5):
                for k in range(5):
                    if i not in (j, k):
                        out[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
        return out

    expected = F.smooth_l1_loss(distances(student), distances(teacher)) + F.smooth_l1_loss(
        angles(student), angles(teacher)
    )
    torch.testing.assert_close(rkd_loss(student, teacher), expected, rtol=1e-5, atol=1e-8)


def test_seed_equals_its_program():
    case = golden("seed_baseline")
    images, queue = case["x"].flatten(1), case["queue0"].T
    weight = case["w_student"].requires_grad_()
    loss = seed_loss(
        unit(images @ weight), unit(images @ case["w_teacher"]), queue, case["t_student"], case["t_teacher"]
    )
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], case["grad"], rtol=1e-4, atol=1e-6)
    head = ContrastiveHead(16, queue.shape[0])
    head.queue.keys.copy_(queue)
    head.enqueue(unit(images @ case["w_teacher"]))
    torch.testing.assert_close(head.queue.keys.T, case["queue1"])


def test_seed_refuses_temperatures_of_zero():
    with pytest.raises(ValueError, match=r"temperatures must be positive, got 0.2 and 0.0"):
        seed_loss(rows(2), rows(2), rows(4), teacher_temperature=0.0)


def test_teacher_gets_no_gradient():
    for loss in (distillation, rkd_loss, lambda s, t: seed_loss(s, t, rows(8))):
        student, teacher = rows(4).requires_grad_(), rows(4, seed=1).requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad is not None


@pytest.mark.parametrize(
    "loss", [distillation, rkd_loss, lambda s, t: seed_loss(s, t, rows(8, dtype=torch.float64), 0.5, 0.5)]
)
def test_gradients(loss):
    student, teacher = rows(4, seed=1, dtype=torch.float64), rows(4, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))
