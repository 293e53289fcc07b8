"""The verbs of ``softclip``."""

from papercore.lab.cli import App

app = App("softclip", help="train CLIP with softened targets and disentangled negatives")
app.command("train", "softclip.train:train", help="train a CLIP; on the sample with CLIP's own loss beside it")
app.command("eval", "softclip.evaluate:evaluate_checkpoint", help="retrieval and zero-shot figures of a checkpoint")
app.command("export", "softclip.export:export", help="a folder that open_clip loads, from ours or an epoch_N.pt")
app.add_study("softclip.study:study")

if __name__ == "__main__":
    raise SystemExit(app())
