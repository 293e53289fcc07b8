"""The verbs of ``sinkd``."""

from papercore.lab.cli import App

app = App("sinkd", help="distil language models by the Sinkhorn distance between batches of outputs")
app.command("train", "sinkd.train:train", help="distil a student; on the sample beside its teacher, no teacher, and KL")
app.command(
    "eval", "sinkd.evaluate:evaluate_checkpoint", help="a model's metrics on a task; writes submission files, too"
)
app.command(
    "cache-teacher", "sinkd.caching:cache_teacher", help="write a teacher's logits to disk once, for many students"
)
app.add_study("sinkd.study:study")
app.command(
    "regimes",
    "sinkd.regimes:regimes",
    help="where the Sinkhorn term helps: weight, eps, batch, classes; table and plot",
)

if __name__ == "__main__":
    raise SystemExit(app())
