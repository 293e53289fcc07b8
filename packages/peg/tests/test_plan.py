import pytest
from peg.batches import PegCollator
from peg.plan import memory_plan
from peg.trainer import PegConfig
from tiny_training import CORPUS, bert, gradients, rows, static

ROWS = ["weights and AdamW", "activations, weights' gradients", "embeddings and their gradients", "blocks of logits"]


@pytest.fixture
def plan(tmp_path):
    """{what for: (MiB, how known)}."""

    def run(model, data=None, **options):
        config = PegConfig(
            output_dir=str(tmp_path), **{"per_device_train_batch_size": 8, "hard_negatives": 2, **options}
        )
        table = memory_plan(model, config, rows() if data is None else data)
        return {name: (float(size.replace(",", "")), how) for name, size, how in table}

    return run


def test_rows_and_their_sum(plan):
    table = plan(bert(width=128, layers=2), micro_batch_tokens=512)
    assert list(table) == [*ROWS, "together"]
    sizes = [size for size, _ in table.values()]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=2)  # each is rounded
    parameters = sum(p.numel() for p in bert(width=128, layers=2).parameters())
    assert table[ROWS[0]] == (round(12 * parameters / 2**20), f"12 bytes for each of {parameters:,} parameters")


def test_the_micro_batch_is_measured_not_the_batch(plan):
    """More queries are more micro-batches, of the same size; more tokens are a larger one."""
    model = bert(width=128, layers=2)
    data = rows(20, negatives=0, pos=[[" ".join(CORPUS[i:] + CORPUS[:i])] for i in range(20)])
    small, wide, large = (
        plan(model, data, per_device_train_batch_size=queries, micro_batch_tokens=tokens)[ROWS[1]]
        for queries, tokens in ((20, 256), (20, 1024), (200, 256))
    )
    assert small[1].startswith("measured: one micro-batch of ")
    assert wide[0] > 2 * small[0] > 0
    assert large[0] == pytest.approx(small[0], abs=1)
    texts = [int(how.split()[4]) for _, how in (small, large)]
    assert [how.split("; ")[1] for _, how in (small, large)] == [
        f"at most {-(-3 * queries // n)} in a step" for queries, n in zip((20, 200), texts, strict=True)
    ]


def test_without_micro_batches_it_grows_with_the_batch(plan):
    model = bert(width=128, layers=2)
    few, many = (plan(model, per_device_train_batch_size=n, micro_batch_tokens=None)[ROWS[1]] for n in (10, 1000))
    assert few[1] == "measured on 10 queries' passages, for 30 candidates at once"
    assert many[1] == "measured on 20 queries' passages, for 3,000 candidates at once"
    assert many[0] > 20 * few[0] > 0


def test_eighty_thousand_candidates_need_no_whole_matrix(plan):
    size, how = plan(static(), target_negatives=80_000, hard_negatives=5)[ROWS[3]]
    assert size <= 64
    assert how == "two of 32 MiB at most; the whole matrix is 4,069 MiB"


def test_it_leaves_no_gradients(plan):
    model = bert()
    plan(model)
    assert not gradients(model)


def test_it_measures_texts_with_the_prompts_and_lengths_of_training(plan, monkeypatch):
    made = []
    call = PegCollator.__call__
    monkeypatch.setattr(PegCollator, "__call__", lambda self, batch: (made.append(self), call(self, batch))[1])
    plan(static(), query_length=5, passage_length=6)
    assert [(c.query_length, c.passage_length, c.hard_negatives) for c in made] == [(5, 6, 2)]
