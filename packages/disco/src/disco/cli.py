"""The verbs of ``disco``."""

from papercore.lab.cli import App

app = App("disco", help="distil self-supervised vision models into small ones")
app.command("pretrain-teacher", "disco.train:pretrain_teacher", help="pre-train a network by MoCo-v2, to be a teacher")
app.command("train", "disco.train:train", help="distil a student; on the sample beside its teacher and a student alone")
app.command("distill", "disco.train:train", help="another name of train")
app.command("eval", "disco.evaluate:evaluate_checkpoint", help="knn or linear: what frozen features are worth")
app.command("export", "disco.export:export", help="the backbone alone, for timm or torchvision")
app.add_study("disco.study:study")
app.command(
    "bottleneck", "disco.plots:plot_bottleneck", help="draw accuracy over the hidden width, from a study's rows"
)

if __name__ == "__main__":
    raise SystemExit(app())
