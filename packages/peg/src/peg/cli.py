"""The verbs of ``peg``."""

from papercore.lab.cli import App

app = App("peg", help="train and use text-retrieval embeddings, with progressively weighted negatives")
app.command("train", "peg.train:train", help="train an encoder; mines hard negatives, judges before and after")
app.command(
    "eval", "peg.evaluate:evaluate_verb", help="nDCG, MRR, Recall and MAP of a model, or of BM25, on a BEIR folder"
)
app.command("encode", "peg.encode:encode_verb", help="write the embeddings of a corpus, for many searches")
app.command("search", "peg.search:search_verb", help="the best documents for queries")
app.command("mine", "peg.mine:mine_verb", help="hard negatives for each query, as training rows")
app.command(
    "clean",
    "peg.clean:clean_verb",
    help="drop training rows that are empty, double, or that a model finds inconsistent",
)
app.add_study("peg.study:study")
app.command(
    "schedules", "peg.schedules:schedules", help="look for a schedule that beats a constant temperature; table and plot"
)

if __name__ == "__main__":
    raise SystemExit(app())
